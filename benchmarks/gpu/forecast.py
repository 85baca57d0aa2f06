"""Real peak memory of the rounds that the stage `speed` measured, against the forecast of their plans."""

import json
from collections.abc import Callable
from typing import Any

from gpu.setting import table
from gpu.speed import GIB, peak_bytes
from rounds import ROOT


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    path = ROOT / "outputs" / "gpu" / f"{device}.json"
    speed = json.loads(path.read_text())["stages"].get("speed") if path.is_file() else None
    if speed is None:
        return {"skipped": "the stage `speed` has no results"}
    rows: dict[str, Any] = {
        f"{network}, {side}": {"forecast": answers[-1]["forecast_bytes"], "peak": peak_bytes(answers)}
        for network, sides in speed["figures"].items()
        for side, answers in sides["answers"].items()
        if answers and answers[-1].get("forecast_bytes") and peak_bytes(answers)
    }
    return rows or {"skipped": "no plan forecasts a peak, or no peak was measured"}


def line(figures: dict[str, Any]) -> str:
    ratios = [row["peak"] / row["forecast"] for row in figures.values()]
    return f"measured / forecast from {min(ratios):.2f} to {max(ratios):.2f}"


def page(figures: dict[str, Any]) -> str:
    rows = [
        [name, f"{row['forecast'] / GIB:.2f}", f"{row['peak'] / GIB:.2f}", f"{row['peak'] / row['forecast']:.2f}"]
        for name, row in figures.items()
    ]
    return table(["", "forecast, GiB", "measured, GiB", "measured / forecast"], rows)
