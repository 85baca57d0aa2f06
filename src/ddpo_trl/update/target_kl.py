"""`target_kl`: the end of a round's updates once the policy has gone far enough from the one that sampled it."""

import torch
from accelerate import Accelerator
from torch import Tensor


class TargetKL:
    """
    Watches the divergence of each update and says when a round's updates are over.

    As in most implementations of PPO the update that finds it too large is itself not made. The target is the limit;
    Stable-Baselines3 stops at 1.5 times its own.

    Args:
        target (`float`):
            The largest divergence with which an update is still made.

    Attributes:
        reached (`bool`):
            Whether the updates of this round are over.
    """

    def __init__(self, target: float):
        self.target = target
        self.reached = False
        self._divergences: list[Tensor] = []

    def begin_round(self) -> None:
        """Updates are made again."""
        self.reached = False
        self._divergences.clear()  # of an update that failed

    def add(self, divergence: Tensor) -> None:
        """The divergence of one micro-batch, a scalar."""
        self._divergences.append(divergence)

    def end_update(self, accelerator: Accelerator) -> None:
        """Decides, on all processes alike, whether the update whose micro-batches were added is to be made."""
        if self.reached:
            return
        divergence = torch.stack(self._divergences).mean()
        self._divergences.clear()
        # Not `>`: an update that found NaN is left out too.
        self.reached = not accelerator.reduce(divergence, "mean").item() <= self.target
