"""Checks of the values that a reward function returned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor


# Larger rewards would overflow when they are squared for a standard deviation.
LARGEST_REWARD = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Answer:
    """
    Checked result of one call of a reward function, for the images it was called with.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Float64 on the CPU, NaN for values that are `None`, NaN or infinite.
        problem (`Exception`, *optional*):
            Error for the first value that is NaN or infinite, or for the whole call.
        not_applicable (`dict[int, Exception]`):
            Errors for the values that are `None`, by index.
    """

    rewards: Tensor
    problem: Exception | None = None
    not_applicable: dict[int, Exception] = field(default_factory=dict)


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
    return Answer(rewards, problem, not_applicable)


def _has_info(answer: Any, count: int) -> bool:
    """Return whether it is a pair `(rewards, info)`, as in TRL ≤ 0.23 and ddpo-pytorch, not a tuple of rewards."""
    if not (isinstance(answer, tuple) and len(answer) == 2):
        return False
    if count == 2 and answer[0] is None:  # the invalid reward of a tuple of rewards, if a reward follows
        return not (answer[1] is None or is_number(answer[1], count))
    return not is_number(answer[0], count)


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


def is_number(value: Any, count: int) -> bool:
    """Return whether `value` is one of `count` rewards; a 0-dim tensor may also be the result for a batch of one."""
    return isinstance(value, Number) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0 and count > 1)
