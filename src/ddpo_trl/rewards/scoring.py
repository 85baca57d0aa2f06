"""Scoring: runs the reward functions in worker threads while the next batch is sampled, and sums their rewards."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpo_trl.finite import NotFiniteError, finite_rows, image_problem
from ddpo_trl.rewards.answers import LARGEST_REWARD, Answer, as_rewards
from ddpo_trl.rewards.function import RewardFunction, check_signature, reward_name, unique_names
from ddpo_trl.rewards.guests import call_as_guest
from ddpo_trl.rewards.pending import PendingRewards
from ddpo_trl.rewards.workers import CallTimeout, DaemonPool
from ddpo_trl.transfers import Behind, behind


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """
    Arguments of [`RewardScorer.submit`]; which images (and their latents) are finite, `(B,)`: the others get no
    reward, and are not passed to the reward functions; and the context for work on them, see
    [`~ddpo_trl.transfers.behind`].
    """

    images: Tensor
    prompts: tuple[str, ...]
    metadata: tuple[Any, ...]
    when: str
    finite: Tensor
    behind: Behind
    finite_steps: Tensor | None
    steps: int

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


class RewardScorer:
    """
    The reward of a sample: a weighted sum of reward functions.

    Args:
        reward_fn (`Callable` or `Sequence[Callable]`):
            See [`~ddpo_trl.rewards.function.RewardFunction`].
        weights (`Sequence[float]`, *optional*):
            One per function; 1 for each by default.
        max_workers (`int`):
            Number of worker threads.
        timeout (`float`, *optional*):
            Time limit of a call in seconds, from when it starts to run. No limit by default.
        argument (`str`, *optional*, defaults to `"reward_fn"`):
            Name of the argument that the functions come from, for error messages.

    Attributes:
        names (`list[str]`):
            Names of the functions, as they are logged.

    Raises:
        `TypeError`: If a reward function can't be called with three arguments.
        `ValueError`: If there is no function, or the number of weights is different.
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
                f"{argument} is the string {reward_fn!r}; pass the function itself, such as "
                "`ddpo_trl.rewards.jpeg_compressibility`. Only the command line accepts names."
            )
        self.functions = list(reward_fn) if isinstance(reward_fn, Sequence) else [reward_fn]
        if not self.functions:
            raise ValueError(f"{argument} is an empty list; pass at least one reward function.")
        for index, function in enumerate(self.functions):
            if not callable(function):
                raise TypeError(
                    f"{argument}[{index}] is {function!r}, which can't be called; pass a function of (images, "
                    "prompts, metadata)."
                )
            check_signature(function, f"{argument}[{index}] (`{reward_name(function)}`)")
        weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(weights)} values for {len(self.functions)} reward functions; pass one each."
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
        Start scoring a batch in the worker threads.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, F, 3, H, W)`):
                Float32 in [0, 1].
            prompts, metadata (`Sequence` of length `B`):
                Prompt and metadata of each image.
            when (`str`):
                For error messages, for instance `"round 3"`.
            finite_steps (`torch.Tensor` of shape `(B,)`, *optional*), steps (`int`, *optional*):
                Number of denoising steps after which the latents of each image were finite, and of all steps.
        """
        finite = finite_rows(images)
        if finite_steps is not None:  # some autoencoders decode infinite latents to finite images
            finite = finite & (finite_steps == steps).to(finite.device)
        batch = ScoredBatch(
            images=images,
            prompts=tuple(prompts),
            metadata=tuple(metadata),
            when=when,
            finite=finite,
            behind=behind(images.device),
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
        Return the weighted sum of `(..., F)` rewards over the functions: `(...)` float64. NaN stands for a function
        that does not apply; the sum is NaN if none applies.
        """
        rewards = rewards.cpu().double()
        return (rewards.nan_to_num(nan=0.0) @ self.weights).masked_fill(rewards.isnan().all(-1), math.nan)


def score(function: RewardFunction, name: str, batch: ScoredBatch, timeout: float | None = None) -> Answer:
    """
    Call one reward function on the finite images of a batch, and check the result.

    It never raises. A failure is returned as the `problem`, because all processes have to learn of it before one of
    them raises, and because the run may be configured to drop only the affected samples.
    """
    start = time.perf_counter()
    with batch.behind():
        finite = batch.finite.tolist()
        rows = [row for row, is_finite in enumerate(finite) if is_finite]
        rewards = torch.full((len(finite),), math.nan, dtype=torch.float64)
        answer = _answer(function, name, batch.only(rows), timeout) if rows else Answer(rewards=rewards[:0])
        rewards[rows] = answer.rewards
        return Answer(
            rewards=rewards,
            problem=batch.problem(finite) or answer.problem,
            not_applicable={rows[index]: error for index, error in answer.not_applicable.items()},
            seconds=time.perf_counter() - start,
        )


def _answer(function: RewardFunction, name: str, batch: ScoredBatch, timeout: float | None) -> Answer:
    where = f"{batch.when}, prompts {list(batch.prompts)}"
    try:
        answer = call_as_guest(function, batch.images, batch.prompts, batch.metadata, timeout, batch.behind)
    except BaseException as error:  # a user's function may raise anything, SystemExit too
        problem = _failure(error, name, where, timeout)
    else:
        try:
            return as_rewards(answer, batch.prompts, name, batch.when)
        except (TypeError, ValueError) as error:
            problem = error
        except Exception as error:  # a CUDA error, for instance, appears when the tensor is read
            problem = _failure(error, name, where, timeout)
    return Answer(rewards=torch.full((len(batch.prompts),), math.nan, dtype=torch.float64), problem=problem)


def _failure(error: BaseException, name: str, where: str, timeout: float | None) -> Exception:
    """Return the error for a call that raised an exception or timed out."""
    failure: Exception
    if isinstance(error, CallTimeout):
        failure = TimeoutError(
            f"Reward function `{name}` did not return within {timeout:g} s ({where}). If it needs more time, increase "
            "reward_timeout."
        )
    else:
        failure = RuntimeError(f"Reward function `{name}` raised {type(error).__name__}: {error} ({where}).")
        failure.__cause__ = error
    return failure
