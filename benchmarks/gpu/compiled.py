"""Rounds with the repeated blocks of the denoiser compiled, and without: the size of Stable Diffusion 1.5."""

from collections.abc import Callable
from typing import Any

from gpu import speed
from gpu.setting import is_rehearsal


SIDES = ["two passes", "two passes, compiled", "one pass", "one pass, compiled"]
REHEARSED = ["two passes", "two passes, compiled", "one pass, compiled"]
NETWORK = "SD 1.5"


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    sides = REHEARSED if is_rehearsal(device) else SIDES
    return {NETWORK: speed.measure(NETWORK, sides, device, lambda found: save({NETWORK: found}))}


line = speed.line


def page(figures: dict[str, Any]) -> str:
    return (
        "`pipeline.unet.compile_repeated_blocks()` before the trainer is made; the first round, which compiles, is "
        "left out.\n" + speed.sections(figures, "two passes")
    )
