"""Rewards that worker threads still compute, and the problems that came up."""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor


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

    def rewards_or_nan(self) -> Tensor:
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
        """Waits for the rewards as [`~PendingRewards.rewards_or_nan`] does, but raises the first problem."""
        if problem := self.problem():
            raise problem
        return self.rewards_or_nan()

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
