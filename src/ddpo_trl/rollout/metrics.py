"""Figures of the training logs, collected between two logs and combined over processes."""

from collections import defaultdict
from collections.abc import Callable, Mapping

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
        names, own = list(self._values), self._own()
        self._values.clear()
        if not names:
            return {}
        of_processes = accelerator.gather(own.to(accelerator.device)[None]).cpu()  # (processes, figures)
        return {name: combination(name)(column).item() for name, column in zip(names, of_processes.T, strict=True)}

    def _own(self) -> Tensor:
        """Figures of this process, `(figures,)`, combined over the time since the last log."""
        tensors = [value.float() for values in self._values.values() for value in values if isinstance(value, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else ())  # the one wait for the device
        combined = []
        for name, values in self._values.items():
            numbers = torch.tensor([next(read) if isinstance(value, Tensor) else value for value in values])
            combined.append(numbers.sum() if name.startswith("time/") else combination(name)(numbers))
        return torch.stack(combined) if combined else torch.zeros(0)


def combination(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that combines a figure over micro-batches, rounds and processes; a time only over these."""
    return torch.max if name == "val/ratio_deviation" else torch.mean
