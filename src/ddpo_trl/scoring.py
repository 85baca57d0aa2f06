"""Runs the reward functions, in worker threads while the next batch is sampled, and checks what they return."""

import asyncio
import functools
import inspect
import itertools
import math
import time
import types
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpo_trl.types import RewardFunction


@dataclass(frozen=True, kw_only=True)
class PendingRewards:
    """
    The rewards of one batch while worker threads compute them.

    Args:
        futures (`Sequence[Future]`):
            One per reward function, each with the rewards of shape `(B,)` and the seconds they took.
    """

    futures: Sequence[Future[tuple[Tensor, float]]]

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(future.done() for future in self.futures)

    def result(self) -> Tensor:
        """Waits for the rewards: `(B, F)` float64, a column per reward function."""
        return torch.stack([future.result()[0] for future in self.futures], dim=1)

    def seconds(self) -> float:
        """Waits, and gives the time spent in the reward functions, summed over threads."""
        return sum(future.result()[1] for future in self.futures)


class RewardScorer:
    """
    The reward of a sample: a weighted sum of reward functions.

    Args:
        reward_fn (`Callable` or `Sequence[Callable]`):
            See [`~ddpo_trl.types.RewardFunction`].
        weights (`Sequence[float]`, *optional*):
            One per function, 1 each by default.
        max_workers (`int`):
            Worker threads.

    Attributes:
        names (`list[str]`):
            The functions' names, as they are logged.

    Raises:
        `TypeError`: If a reward function can't be called with three arguments.
        `ValueError`: If there is none, or their number is not that of the weights.
    """

    def __init__(
        self,
        reward_fn: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        max_workers: int = 2,
    ):
        self.functions = list(reward_fn) if isinstance(reward_fn, Sequence) else [reward_fn]
        if not self.functions:
            raise ValueError("reward_fn is an empty list; give at least one reward function.")
        for index, function in enumerate(self.functions):
            if not callable(function):
                raise TypeError(
                    f"reward_fn[{index}] is {function!r}, which can't be called; give a function of (images, prompts, "
                    "metadata)."
                )
            _check_signature(function, f"reward_fn[{index}] (`{reward_name(function)}`)")
        weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(weights)} values for {len(self.functions)} reward functions; give one each."
            )
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.names = unique_names([reward_name(function) for function in self.functions])
        self._pool = ThreadPoolExecutor(max_workers, thread_name_prefix="reward")

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any], when: str) -> PendingRewards:
        """
        Starts scoring a batch in the worker threads.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, F, 3, H, W)`):
                Float32 in [0, 1].
            prompts, metadata (`Sequence` of length `B`):
                What belongs to each image.
            when (`str`):
                For error messages, for instance `"round 3"`.
        """
        batch = (images, tuple(prompts), tuple(metadata))
        return PendingRewards(
            futures=[
                self._pool.submit(score, function, name, batch, when)
                for function, name in zip(self.functions, self.names, strict=True)
            ]
        )

    def total(self, rewards: Tensor) -> Tensor:
        """The weighted sum over the functions of `(N, F)` rewards: `(N,)` float64."""
        return rewards.cpu().double() @ self.weights


def _check_signature(function: RewardFunction, which: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C don't tell theirs
        return
    try:
        signature.bind("images", "prompts", "metadata")
    except TypeError as error:
        raise TypeError(
            f"{which} has the parameters {signature}, but is called with three: (images, prompts, metadata)."
        ) from error


def score(
    function: RewardFunction, name: str, batch: tuple[Tensor, tuple[str, ...], tuple[Any, ...]], when: str
) -> tuple[Tensor, float]:
    """
    Calls one reward function and checks its answer.

    Returns:
        Rewards of shape `(B,)`, float64 on the CPU, and the seconds they took.

    Raises:
        `RuntimeError`: If the function raised; the cause is chained.
        `TypeError` or `ValueError`: As [`as_rewards`].
    """
    start = time.perf_counter()
    try:
        answer = function(*batch)
        if inspect.isawaitable(answer):
            answer = asyncio.run(_wait_for(answer))
    except Exception as error:  # a user's function may raise anything, and must be named whatever it is
        raise RuntimeError(
            f"Reward function `{name}` raised {type(error).__name__}: {error} ({when}, prompts {list(batch[1])}). "
            "Checkpoints of finished rounds are intact."
        ) from error
    return as_rewards(answer, len(batch[1]), name, when), time.perf_counter() - start


async def _wait_for(answer: Awaitable[Any]) -> Any:
    return await answer


def as_rewards(answer: Any, count: int, name: str, when: str = "") -> Tensor:
    """
    What a reward function returned, as a tensor.

    Args:
        answer (list, array or tensor, or a pair of one of these and anything):
            B numbers, integers too, on any device; or `(rewards, info)`.
        count (`int`):
            The number B of images.
        name, when (`str`):
            For error messages.

    Returns:
        `torch.Tensor` of shape `(B,)`, float64 on the CPU.

    Raises:
        `TypeError`: If it is not a collection of numbers.
        `ValueError`: If it has not B values, or one is NaN or infinite.
    """
    where = f"Reward function `{name}`" + (f" ({when})" if when else "")
    if isinstance(answer, tuple) and len(answer) == 2 and not is_number(answer[0], count):
        answer = answer[0]  # (rewards, info), as TRL ≤ 0.23 and ddpo-pytorch want
    if not isinstance(answer, list | tuple | np.ndarray | Tensor):
        raise TypeError(f"{where} returned {answer!r}; it must return one number per image.")
    values = answer.reshape(-1).tolist() if isinstance(answer, np.ndarray | Tensor) else list(answer)
    if len(values) != count:
        raise ValueError(f"{where} returned {len(values)} values for {count} images; it must return one per image.")
    rewards = [_finite_number(value, f"{where} returned {value!r} for image {i}") for i, value in enumerate(values)]
    return torch.tensor(rewards, dtype=torch.float64)


def _finite_number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what}; it must be a number.") from error
    if isinstance(value, str):  # "8", which float() takes
        raise TypeError(f"{what}; it must be a number.")
    if not math.isfinite(number):
        raise ValueError(f"{what}; rewards must be finite.")
    return number


def is_number(value: Any, count: int) -> bool:
    """Whether `value` is one of `count` rewards; a 0-dim tensor may also be all of a batch of one."""
    return isinstance(value, Number) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0 and count > 1)


def reward_name(function: Any) -> str:
    """The name of a reward function: a function's own, a callable object's class."""
    if isinstance(function, functools.partial):
        return reward_name(function.func)
    if isinstance(function, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return function.__name__
    return type(function).__name__


def unique_names(names: Sequence[str]) -> list[str]:
    """Names in the same order; those that occur again get a number: `["a", "a"]` → `["a", "a_2"]`."""
    unique: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique
