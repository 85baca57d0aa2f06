"""Rewards that worker threads are computing, and the errors of those that are missing."""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ddpo_trl.rewards.answers import Answer


@dataclass(frozen=True, kw_only=True)
class PendingRewards:
    """Rewards of one batch, a future per reward function. Every method except `done` waits for them."""

    futures: Sequence[Future[Answer]]

    def done(self) -> bool:
        """Return whether all rewards are computed."""
        return all(future.done() for future in self.futures)

    def rewards_or_nan(self) -> Tensor:
        """
        Return the rewards: `(B, F)` float64, one column per reward function. NaN for a function that returned `None`,
        and in the whole row of an image for which a function has no valid reward.
        """
        answers = [future.result() for future in self.futures]
        rewards = torch.stack([answer.rewards for answer in answers], dim=1)
        rewards[torch.stack([answer.invalid() for answer in answers]).any(0)] = math.nan
        return rewards

    def problem(self) -> Exception | None:
        """Return the error for the first sample without a valid reward; `None` if all have one."""
        answers = [future.result() for future in self.futures]
        if problem := next((answer.problem for answer in answers if answer.problem is not None), None):
            return problem
        first, *others = (answer.not_applicable for answer in answers)
        return next((error for row, error in first.items() if all(row in other for other in others)), None)

    def result(self) -> Tensor:
        """Return the rewards as [`~PendingRewards.rewards_or_nan`] does, or raise the first problem."""
        if problem := self.problem():
            raise problem
        return self.rewards_or_nan()

    def seconds(self) -> float:
        """Return the time spent in the reward functions, summed over threads."""
        return sum(future.result().seconds for future in self.futures)


def first_problem(pending: Sequence[PendingRewards], raises: bool) -> str | None:
    """
    Wait for rewards, and return the message of the first problem on any process. All processes have to call it.

    Args:
        pending (`Sequence[PendingRewards]`):
            The batches of this process.
        raises (`bool`):
            Raise the problem instead, on all processes: if only one stopped, the others would wait for it in their
            next collective call.
    """
    own = next((problem for scores in pending if (problem := scores.problem())), None)
    messages = gather_object([None if own is None else str(own)])
    found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if found and raises:
        raise own or RuntimeError("On process {}: {}".format(*found[0]))
    return found[0][1] if found else None
