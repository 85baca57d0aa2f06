"""Shared parts of the stages: the device, and the format of numbers."""

import logging
import math
import warnings
from collections.abc import Iterable, Sequence

import torch


def quiet() -> None:
    """Leave errors and results on the screen."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def is_rehearsal(device: str) -> bool:
    """Return whether this is the rehearsal on a CPU, with small sizes."""
    return device == "cpu"


def synchronize(device: str) -> None:
    """Wait until a device has done all that was asked of it, so that a clock can be read."""
    if device == "cuda":
        torch.cuda.synchronize()


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def short(value: float) -> str:
    """Return a deviation in few characters; 0 only if it is exactly 0."""
    if math.isnan(value):
        return "not a number"
    return "0" if value == 0 else f"{value:.1e}"


def nan_last(value: float) -> float:
    """Return a key that sorts what is not a number behind all numbers, so that it is the largest."""
    return math.inf if math.isnan(value) else value
