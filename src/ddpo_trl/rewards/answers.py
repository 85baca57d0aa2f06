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
    What a call of a reward function gave; as in [`Scores`], for the images that it saw.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Float64 on the CPU, NaN for values that are `None`, NaN or infinite.
        problem (`Exception`, *optional*):
            The error for the first value that is NaN or infinite, or for the call.
        not_applicable (`dict[int, Exception]`):
            The errors for those that are `None`.
    """

    rewards: Tensor
    problem: Exception | None = None
    not_applicable: dict[int, Exception] = field(default_factory=dict)


def as_rewards(answer: Any, prompts: Sequence[str], name: str, when: str = "") -> Answer:
    """
    What a reward function returned, as a tensor.

    Args:
        answer (list, array or tensor, or a pair of one of these and anything):
            B numbers, integers too, on any device; or `(rewards, info)`.
        prompts (`Sequence[str]` of length `B`):
            The prompts of the images.
        name, when (`str`):
            For error messages.

    Returns:
        [`Answer`]

    Raises:
        `TypeError`: If it is not a collection of numbers.
        `ValueError`: If it has not B values.
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
    """Whether it is `(rewards, info)`, as TRL ≤ 0.23 and ddpo-pytorch want it, and not a tuple of rewards."""
    if not (isinstance(answer, tuple) and len(answer) == 2):
        return False
    if count == 2 and answer[0] is None:  # an invalid reward, if a reward follows
        return not (answer[1] is None or is_number(answer[1], count))
    return not is_number(answer[0], count)


def _number(value: Any, what: str, about: str) -> float:
    """The value as a finite float, or else NaN."""
    if value is None:
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        return math.nan
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what}; it must be a number. {about}") from error
    if isinstance(value, str | bytes | np.complexfloating):  # "8", which float() takes, or a part of 8 + 1j
        raise TypeError(f"{what}; it must be a number. {about}")
    return number if abs(number) <= LARGEST_REWARD else math.nan  # a NaN compares as false


def is_number(value: Any, count: int) -> bool:
    """Whether `value` is one of `count` rewards; a 0-dim tensor may also be all of a batch of one."""
    return isinstance(value, Number) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0 and count > 1)
