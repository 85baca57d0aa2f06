"""Rounds with a compiled denoiser, and without: the size of Stable Diffusion 1.5."""

from collections.abc import Callable
from typing import Any

from gpu import speed


SIDES = ["two passes", "two passes, compiled", "one pass"]
NETWORK = "SD 1.5"


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    return {NETWORK: speed.measure(NETWORK, SIDES, device, lambda found: save({NETWORK: found}))}


line = speed.line


def page(figures: dict[str, Any]) -> str:
    return (
        "`torch_compile=True`, which disables one pass, against one pass without it; the first round, which compiles, "
        "is left out.\n" + speed.sections(figures, "two passes")
    )
