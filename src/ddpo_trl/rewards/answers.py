"""Checks of the values that a reward function returned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


# Larger rewards would overflow when they are squared for a standard deviation.
LARGEST_REWARD = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Answer:
    """
    Result of one reward function for one batch.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Float64 on the CPU. NaN if there is no valid reward: for images whose value is NaN, infinite or `None`, and
            for all images of a call that failed.
        problem (`Exception`, *optional*):
            First error for a NaN whose value was not `None`. Its message names the function, round, prompt and
            value.
        not_applicable (`dict[int, Exception]`):
            Images whose value is `None`, each with the error to raise if no other function applies either.
        seconds (`float`):
            Time that the call took.
    """

    rewards: Tensor
    problem: Exception | None = None
    not_applicable: dict[int, Exception] = field(default_factory=dict)
    seconds: float = 0.0

    def invalid(self) -> Tensor:
        """Return which images lack a reward, except those whose value is `None`: `(B,)`."""
        invalid = self.rewards.isnan()
        invalid[list(self.not_applicable)] = False
        return invalid


def as_rewards(answer: Any, prompts: Sequence[str], name: str, when: str = "") -> Answer:
    """
    Convert the value that a reward function returned to a tensor.

    Args:
        answer (list, array or tensor, or a pair of one of these and anything):
            B numbers on any device, integers too; or `(rewards, info)`.
        prompts (`Sequence[str]` of length `B`):
            Prompts of the images.
        name, when (`str`):
            For error messages.

    Returns:
        [`Answer`]

    Raises:
        `TypeError`: If the value is not a collection of numbers.
        `ValueError`: If it does not have B entries.
    """
    where = f"Reward function `{name}`" + (f" ({when})" if when else "")
    of_batch = f"The prompts are {list(prompts)}."
    if _has_info(answer, len(prompts)):
        answer = answer[0]
    if not isinstance(answer, list | tuple | np.ndarray | Tensor):
        raise TypeError(f"{where} returned {answer!r}; it must return one number per image. {of_batch}")
    values = answer.reshape(-1).tolist() if isinstance(answer, np.ndarray | Tensor) else list(answer)
    if len(values) != len(prompts):
        raise ValueError(
            f"{where} returned {len(values)} values for {len(prompts)} images; it must return one per image. "
            f"{of_batch}"
        )
    places = [
        (value, f"{where} returned {value!r} for image {index}", f"Its prompt is {prompt!r}.")
        for index, (value, prompt) in enumerate(zip(values, prompts, strict=True))
    ]
    rewards = torch.tensor([_number(*place) for place in places], dtype=torch.float64)
    not_applicable: dict[int, Exception] = {}
    problem = None
    for index in rewards.isnan().nonzero().flatten().tolist():
        value, what, about = places[index]
        if value is None:
            not_applicable[index] = TypeError(f"{what}; it must be a number. {about}")
        else:
            problem = problem or ValueError(f"{what}; rewards must be finite in float32. {about}")
    return Answer(rewards=rewards, problem=problem, not_applicable=not_applicable)


def _has_info(answer: Any, count: int) -> bool:
    """Return whether it is a pair `(rewards, info)`, as in TRL ≤ 0.23 and ddpo-pytorch, not a tuple of two rewards."""
    if not (isinstance(answer, tuple) and len(answer) == 2):
        return False
    rewards = answer[0]
    if isinstance(rewards, np.ndarray | Tensor):
        return rewards.ndim > 0 or count == 1  # a 0-dim tensor is one of two rewards, or the mean of a batch of one
    return isinstance(rewards, list | tuple)


def _number(value: Any, what: str, about: str) -> float:
    """Return the value as a finite float, or NaN."""
    if value is None:
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an integer too large for a float
        return math.nan
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what}; it must be a number. {about}") from error
    if isinstance(value, str | bytes | np.complexfloating):  # float() accepts "8", and the real part of NumPy's 8 + 1j
        raise TypeError(f"{what}; it must be a number. {about}")
    return number if abs(number) <= LARGEST_REWARD else math.nan  # false for NaN
