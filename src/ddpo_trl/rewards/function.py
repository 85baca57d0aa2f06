"""The signature of a reward function, and the name it is logged under."""

import functools
import inspect
import itertools
import types
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ddpo_trl.rewards.remote import RemoteReward


class RewardFunction(Protocol):
    """
    Any callable that scores a batch of images. It may be an `async def`, and it runs in a worker thread.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
            Float32 in [0, 1], on the sampling device.
        prompts (`tuple[str, ...]` of length `B`):
            The prompts.
        metadata (`tuple[Any, ...]` of length `B`):
            Second value that `prompt_fn` returned with each prompt; for a dataset, a dict of its other columns.

    Returns:
        B numbers as a list, array or tensor (on any device, integers too), or a pair `(rewards, info)` as returned by
        reward functions for TRL ≤ 0.23 and ddpo-pytorch; `info` is ignored.
    """

    def __call__(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], /) -> Any: ...


def check_signature(function: RewardFunction, which: str) -> None:
    """Raise `TypeError`, with the name `which`, if a reward function can't be called with three arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind("images", "prompts", "metadata")
    except TypeError as error:
        raise TypeError(
            f"{which} has the parameters {signature}, but it is called with three: (images, prompts, metadata)."
        ) from error


def reward_name(function: Any) -> str:
    """Return the name of a function, the class name of a callable object, or the name of a served function."""
    if isinstance(function, functools.partial):
        return reward_name(function.func)
    if isinstance(function, RemoteReward):
        return function.name
    if isinstance(function, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return function.__name__
    return type(function).__name__


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names in the same order, repeated ones with a number: `["a", "a"]` → `["a", "a_2"]`."""
    unique: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique
