"""Figures of the training logs, collected between two logs and combined over processes."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class Metrics:
    """
    Figures collected since the last log: means over micro-batches, rounds and processes, except the deviation
    (maximum) and times (sum over the rounds of the log).
    """

    def __init__(self) -> None:
        self._values: defaultdict[str, list[Tensor | float]] = defaultdict(list)

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add figures by name: numbers, or tensors without gradient of shape `()`."""
        for name, value in values.items():
            self._values[name].append(value)

    def clear(self) -> None:
        """Forget what was not logged."""
        self._values.clear()

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Combine the figures and forget them. All processes have to call it."""
        metrics = {}
        for name, values in self._values.items():
            local = torch.tensor([float(value) for value in values], device=accelerator.device)
            combine = torch.max if name == "val/ratio_deviation" else torch.mean
            own = torch.sum(local) if name.startswith("time/") else combine(local)
            metrics[name] = combine(accelerator.gather(own)).item()
        self._values.clear()
        return metrics
