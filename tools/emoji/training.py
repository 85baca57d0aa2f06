"""Checkpoints of a training run that may be killed at any moment."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass
class TrainingState:
    """Progress of a training run.

    Attributes:
        step: Optimizer steps taken.
        seconds: Wall-clock time spent training, over all resumptions.
    """

    step: int = 0
    seconds: float = 0.0


def save_training_state(
    path: Path, state: TrainingState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **extra: object
) -> None:
    """Writes everything needed to resume; the old checkpoint stays until the new one is complete."""
    partial = path.with_suffix(".partial")
    torch.save(
        {"state": asdict(state), "model": model.state_dict(), "optimizer": optimizer.state_dict(), **extra}, partial
    )
    partial.replace(path)


def load_training_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Restores a checkpoint of [`save_training_state`], except the extras."""
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return TrainingState(**saved["state"])
