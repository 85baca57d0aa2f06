"""Runs the reward functions, in worker threads while the next batch is sampled, and checks what they return."""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import os
import threading
import time
import types
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from ddpo_trl.descriptions import own_copy
from ddpo_trl.finite import NotFiniteError, finite_rows, image_problem
from ddpo_trl.rewards.remote import RemoteReward
from ddpo_trl.rewards.workers import CallTimeout, DaemonPool, call_within


class RewardFunction(Protocol):
    """
    Any callable that scores a batch of images. It may be an `async def`, and it runs in a worker thread.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
            Float32 in [0, 1], on the sampling device.
        prompts (`tuple[str, ...]` of length `B`):
            The prompts.
        metadata (`tuple[Any, ...]` of length `B`):
            What `prompt_fn` returned beside each prompt; a dataset's other columns as a dict.

    Returns:
        B numbers as list, array or tensor (any device, integers too), or a pair `(rewards, info)` as reward functions
        written for TRL ≤ 0.23 and ddpo-pytorch return; `info` is ignored.
    """

    def __call__(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], /) -> Any: ...


# What a reward function may change for the whole process: how it is read, and how it is put back.
SHARED: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (os.getcwd, os.chdir),  # output_dir may be relative
]

# Larger rewards would overflow when they are squared for a standard deviation.
LARGEST_REWARD = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """
    Sampled images on their way to the reward functions.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, F, 3, H, W)`):
            Float32 in [0, 1].
        prompts, metadata (`tuple` of length `B`):
            What belongs to each image.
        when (`str`):
            For error messages, for instance `"round 3"`.
        finite (`torch.Tensor` of shape `(B,)`):
            Whether each image and its latents are finite. One that is not has no reward, and no reward function sees
            it.
        finite_steps (`torch.Tensor` of shape `(B,)`, *optional*), steps (`int`):
            Denoising steps after which the latents of each sample were finite, of how many.
    """

    images: Tensor
    prompts: tuple[str, ...]
    metadata: tuple[Any, ...]
    when: str
    finite: Tensor
    finite_steps: Tensor | None = None
    steps: int = 0

    def only(self, rows: Sequence[int]) -> "ScoredBatch":
        """Return the batch with these images only."""
        if len(rows) == len(self.prompts):
            return self
        return dataclasses.replace(
            self,
            images=self.images[list(rows)],
            prompts=tuple(self.prompts[row] for row in rows),
            metadata=tuple(self.metadata[row] for row in rows),
        )

    def problem(self, finite: Sequence[bool]) -> NotFiniteError | None:
        """Return the error for the first image that is not finite; `None` if all are."""
        if all(finite):
            return None
        index = finite.index(False)
        finite_steps = None if self.finite_steps is None else self.finite_steps.tolist()
        return image_problem(self.when, index, self.prompts[index], finite_steps, self.steps)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """
    What one reward function said about one batch.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Float64 on the CPU. NaN where there is no valid reward: for single images whose value is NaN, infinite or
            `None`, for all images of a call that failed.
        problem (`Exception`, *optional*):
            Why there is a NaN that is not a `None`; of several, the first. Its message names the function, round,
            prompt and value.
        not_applicable (`dict[int, Exception]`):
            The images whose value is `None`, each with the error to show if no other function applies either.
        seconds (`float`):
            The time it took.
    """

    rewards: Tensor
    problem: Exception | None
    not_applicable: dict[int, Exception]
    seconds: float

    def invalid(self) -> Tensor:
        """Whether each image lacks a reward that it should have: `(B,)`."""
        invalid = self.rewards.isnan()
        invalid[list(self.not_applicable)] = False
        return invalid


@dataclass(frozen=True, kw_only=True)
class PendingRewards:
    """
    The rewards of one batch while worker threads compute them.

    Args:
        futures (`Sequence[Future[Scores]]`):
            One per reward function.
    """

    futures: Sequence[Future[Scores]]

    def done(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(future.done() for future in self.futures)

    def marked(self) -> Tensor:
        """
        Waits for the rewards: `(B, F)` float64, a column per reward function. NaN where a function returned `None`,
        and in the whole row of an image for which one of them has no valid reward.
        """
        scores = [future.result() for future in self.futures]
        rewards = torch.stack([each.rewards for each in scores], dim=1)
        rewards[torch.stack([each.invalid() for each in scores]).any(0)] = math.nan
        return rewards

    def problem(self) -> Exception | None:
        """Waits, and gives the first reason why a sample has no valid reward; `None` if all have one."""
        scores = [future.result() for future in self.futures]
        if problem := next((each.problem for each in scores if each.problem is not None), None):
            return problem
        first, *others = (each.not_applicable for each in scores)
        return next((error for row, error in first.items() if all(row in other for other in others)), None)

    def result(self) -> Tensor:
        """Waits for the rewards as [`~PendingRewards.marked`] does, but raises the first problem."""
        if problem := self.problem():
            raise problem
        return self.marked()

    def seconds(self) -> float:
        """Waits, and gives the time spent in the reward functions, summed over threads."""
        return sum(future.result().seconds for future in self.futures)


def first_problem(pending: Sequence[PendingRewards], raises: bool) -> str | None:
    """
    Waits, and gives the first problem with a reward on any process. All processes have to call it.

    Args:
        pending (`Sequence[PendingRewards]`):
            The batches of this process.
        raises (`bool`):
            Whether a problem is raised, on all processes at once: if only one left, the others would wait for it in
            their next collective call.
    """
    own = next((problem for scores in pending if (problem := scores.problem())), None)
    messages = gather_object([None if own is None else str(own)])
    found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if found and raises:
        raise own or RuntimeError("On process {}: {}".format(*found[0]))
    return found[0][1] if found else None


class RewardScorer:
    """
    The reward of a sample: a weighted sum of reward functions.

    Args:
        reward_fn (`Callable` or `Sequence[Callable]`):
            See [`~ddpo_trl.rewards.scoring.RewardFunction`].
        weights (`Sequence[float]`, *optional*):
            One per function, 1 each by default.
        max_workers (`int`):
            Worker threads.
        timeout (`float`, *optional*):
            Seconds that a call may take, counted from when it starts to run. No limit by default.
        argument (`str`, *optional*, defaults to `"reward_fn"`):
            What the user gave the functions as, for error messages.

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
        timeout: float | None = None,
        argument: str = "reward_fn",
    ):
        if isinstance(reward_fn, str):
            raise TypeError(
                f"{argument} is the string {reward_fn!r}; give the function itself, such as "
                "`ddpo_trl.rewards.jpeg_compressibility`. Names are for the command line."
            )
        self.functions = list(reward_fn) if isinstance(reward_fn, Sequence) else [reward_fn]
        if not self.functions:
            raise ValueError(f"{argument} is an empty list; give at least one reward function.")
        for index, function in enumerate(self.functions):
            if not callable(function):
                raise TypeError(
                    f"{argument}[{index}] is {function!r}, which can't be called; give a function of (images, "
                    "prompts, metadata)."
                )
            _check_signature(function, f"{argument}[{index}] (`{reward_name(function)}`)")
        weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(weights)} values for {len(self.functions)} reward functions; give one each."
            )
        if not all(abs(weight) <= LARGEST_REWARD for weight in weights):
            raise ValueError(f"reward_weights is {weights}; all of them must be finite.")
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.names = unique_names([reward_name(function) for function in self.functions])
        self.timeout = timeout
        self._pool = DaemonPool(max_workers, name="reward")

    def submit(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Any],
        when: str,
        finite_steps: Tensor | None = None,
        steps: int = 0,
    ) -> PendingRewards:
        """
        Starts scoring a batch in the worker threads.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, F, 3, H, W)`):
                Float32 in [0, 1].
            prompts, metadata (`Sequence` of length `B`):
                What belongs to each image.
            when (`str`):
                For error messages, for instance `"round 3"`.
            finite_steps (`torch.Tensor` of shape `(B,)`, *optional*), steps (`int`, *optional*):
                See [`ScoredBatch`]; for the message about an image that is not finite.
        """
        finite = finite_rows(images)
        if finite_steps is not None:  # some autoencoders make finite images of infinite latents
            finite = finite & (finite_steps == steps).to(finite.device)
        batch = ScoredBatch(
            images=images,
            prompts=tuple(prompts),
            metadata=tuple(metadata),
            when=when,
            finite=finite,
            finite_steps=finite_steps,
            steps=steps,
        )
        return PendingRewards(
            futures=[
                self._pool.submit(functools.partial(score, function, name, batch, self.timeout))
                for function, name in zip(self.functions, self.names, strict=True)
            ]
        )

    @property
    def weight_of(self) -> dict[str, float]:
        """Weights of the reward functions, by name."""
        return dict(zip(self.names, self.weights.tolist(), strict=True))

    def total(self, rewards: Tensor) -> Tensor:
        """
        The weighted sum over the functions of `(..., F)` rewards: `(...)` float64. NaN stands for a function that does
        not apply; the sum is NaN where none does.
        """
        rewards = rewards.cpu().double()
        return (rewards.nan_to_num(nan=0.0) @ self.weights).masked_fill(rewards.isnan().all(-1), math.nan)


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


def score(function: RewardFunction, name: str, batch: ScoredBatch, timeout: float | None = None) -> Scores:
    """
    Call one reward function on the finite images of a batch and check its answer.

    It never raises: a failure is kept as the `problem`, because on one of several processes it must not be raised
    before the others know of it, and because it may be configured to cost no more than the samples concerned.
    """
    start = time.perf_counter()
    finite = batch.finite.tolist()
    rows = [row for row, is_finite in enumerate(finite) if is_finite]
    rewards = torch.full((len(finite),), math.nan, dtype=torch.float64)
    answer = _answer(function, name, batch.only(rows), timeout) if rows else Answer(rewards[:0])
    rewards[rows] = answer.rewards
    return Scores(
        rewards=rewards,
        problem=batch.problem(finite) or answer.problem,
        not_applicable={rows[index]: error for index, error in answer.not_applicable.items()},
        seconds=time.perf_counter() - start,
    )


def _answer(function: RewardFunction, name: str, batch: ScoredBatch, timeout: float | None) -> "Answer":
    where = f"{batch.when}, prompts {list(batch.prompts)}"
    try:
        answer = call_as_guest(function, batch.images, batch.prompts, batch.metadata, timeout)
    except BaseException as error:  # a user's function may raise anything, and must be named whatever it is
        problem = _failure(error, name, where, timeout)
    else:
        try:
            return as_rewards(answer, batch.prompts, name, batch.when)
        except (TypeError, ValueError) as error:
            problem = error
        except Exception as error:  # an error on the GPU, for instance, comes up when its tensor is read
            problem = _failure(error, name, where, timeout)
    return Answer(torch.full((len(batch.prompts),), math.nan, dtype=torch.float64), problem)


def call_as_guest(
    function: RewardFunction,
    images: Tensor,
    prompts: tuple[str, ...],
    metadata: tuple[Any, ...],
    timeout: float | None = None,
) -> Any:
    """
    Call a reward function so that nothing it does to its arguments or to torch's settings is seen outside: with
    images and metadata of its own, in a thread of its own, without gradients, and with the images' GPU as the current
    device. It may be `async`.

    Args:
        function (`Callable`):
            See [`~ddpo_trl.rewards.scoring.RewardFunction`].
        images, prompts, metadata:
            Its arguments.
        timeout (`float`, *optional*):
            Seconds that it may take.

    Raises:
        [`~ddpo_trl.rewards.workers.CallTimeout`]: If it takes longer. Whatever the function raises, it raises too.
    """

    def call() -> Any:
        # Every thread starts on the first GPU: a model that the function loads to "cuda" would go there on all ranks.
        on_gpu = torch.accelerator.device_index(None if images.device.type == "cpu" else images.device.index)
        with GUESTS.visit(), on_gpu, torch.no_grad():
            answer = function(images.detach().clone(), prompts, tuple(map(own_copy, metadata)))
            return asyncio.run(_await_within(timeout, answer)) if inspect.isawaitable(answer) else answer

    return call_within(timeout, call)


class Guests:
    """
    Gives what all threads share ([`SHARED`]: torch's default dtype, the working directory) back as it was when the
    first of several concurrent reward functions began. It is done after the last of them: one that is still loading a
    model may need another dtype meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[Any] = []

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """Surrounds the call of a function."""
        with self._lock:
            if not self._inside:
                self._before = [get() for get, _ in SHARED]
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for (_, restore), value in zip(SHARED, self._before, strict=True):
                        restore(value)


GUESTS = Guests()


async def _await_within(seconds: float | None, answer: Awaitable[Any]) -> Any:
    """Cancels what is awaited when the time is over: unlike a thread, it can be."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await answer
    except TimeoutError:
        if limit.expired():
            raise CallTimeout from None
        raise


def _failure(error: BaseException, name: str, where: str, timeout: float | None) -> Exception:
    """The error to show for a call that gave no answer."""
    failure: Exception
    if isinstance(error, CallTimeout):
        failure = TimeoutError(
            f"Reward function `{name}` gave no answer within {timeout:g} s ({where}). If it needs more, raise "
            "reward_timeout."
        )
    else:
        failure = RuntimeError(f"Reward function `{name}` raised {type(error).__name__}: {error} ({where}).")
        failure.__cause__ = error
    return failure


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


def reward_name(function: Any) -> str:
    """The name of a reward function: a function's own, a callable object's class, that of what a server computes."""
    if isinstance(function, functools.partial):
        return reward_name(function.func)
    if isinstance(function, RemoteReward):
        return function.name
    if isinstance(function, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return function.__name__
    return type(function).__name__


def unique_names(names: Sequence[str]) -> list[str]:
    """Names in the same order; those that occur again get a number: `["a", "a"]` → `["a", "a_2"]`."""
    unique: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique
