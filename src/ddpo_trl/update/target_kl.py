"""`target_kl`: the end of a round's updates once the policy has gone far enough from the one that sampled it."""

import torch
from accelerate import Accelerator
from torch import Tensor


class TargetKL:
    """
    Divergence of each update, and the end of a round's updates once it exceeds `target`.

    As in most implementations of PPO, the update that exceeds the target is itself skipped. The target is the limit;
    Stable-Baselines3 stops at 1.5 times its own.

    Attributes:
        reached (`bool`):
            Whether the updates of this round are over.
    """

    def __init__(self, target: float):
        self.target = target
        self.reached = False
        self._divergences: list[Tensor] = []

    def begin_round(self) -> None:
        """Allow updates again."""
        self.reached = False
        self._divergences.clear()  # of an update that failed

    def add(self, divergence: Tensor) -> None:
        """Add the divergence of one micro-batch, a scalar."""
        self._divergences.append(divergence)

    def end_update(self, accelerator: Accelerator) -> None:
        """Decide, on all processes alike, whether the update whose micro-batches were added is made."""
        if self.reached:
            return
        divergence = torch.stack(self._divergences).mean()
        self._divergences.clear()
        # Not `>`: an update that found NaN is left out too.
        self.reached = not accelerator.reduce(divergence, "mean").item() <= self.target
