"""
Time and peak memory of a round at the sizes of Stable Diffusion 1.5 and SDXL, with random weights in bfloat16.

In one pass and in two, with activation checkpointing and without, against TRL 0.23.1's loop and against the denoiser
alone. Each side has its own process, and rounds are interleaved, so that ratios are those of neighboring rounds.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from gpu.setting import is_rehearsal, table
from gpu.side import run_side
from gpu.workers import Worker, WorkerEnded


GIB = 2**30
SIDES = ["floor", "TRL's loop", "two passes", "one pass", "two passes, checkpointing", "one pass, checkpointing"]
NETWORKS = ["SD 1.5", "SDXL"]

Answers = dict[str, list[dict[str, Any]]]  # rounds of each side


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for network in NETWORKS:

        def save_these(found: dict[str, Any], network: str = network) -> None:
            save({**figures, network: found})

        figures[network] = measure(network, SIDES, device, save_these)
    require_equal_work(figures)
    return figures


def measure(network: str, sides: Sequence[str], device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """
    Measure interleaved rounds of some sides; the first of each, the warm-up, is left out.

    Returns:
        `dict`: The answers of each side, and the errors of those that ended.
    """
    repeats = 1 if is_rehearsal(device) else 3
    children = {side: Worker(run_side, network, side, device, repeats + 1) for side in sides}
    answers: Answers = {side: [] for side in sides}
    errors: dict[str, str] = {}
    ask_all(children, errors, lambda side, child: child.answer())  # when it is ready

    def one_round(side: str, child: Worker) -> None:
        child.ask("round")
        answers[side].append(child.answer())

    for repeat in range(repeats + 1):
        ask_all(children, errors, one_round, backwards=bool(repeat % 2))
        if repeat == 0:
            for rounds in answers.values():
                rounds.clear()
        save({"answers": answers, "errors": errors})
    for child in children.values():
        child.end()
    return {"answers": answers, "errors": errors}


def ask_all(
    children: dict[str, Worker],
    errors: dict[str, str],
    ask: Callable[[str, Worker], object],
    backwards: bool = False,
) -> None:
    """Ask each side in turn. One that has ended is left out from then on, with its error."""
    for side, child in sorted(children.items(), reverse=backwards):
        try:
            ask(side, child)
        except WorkerEnded as error:
            errors[side] = str(error)
            del children[side]


def require_equal_work(figures: dict[str, Any]) -> None:
    """Raise a `RuntimeError` if TRL's loop and two passes do not denoise the same number of samples."""
    for network, found in figures.items():
        counts = {
            side: found["answers"][side][-1]["denoised"]
            for side in ("floor", "TRL's loop", "two passes")
            if found["answers"][side]
        }
        if len(set(counts.values())) > 1:
            raise RuntimeError(f"The comparison for {network} is not valid: samples denoised per round are {counts}.")


# ---- Results ----


def seconds(answers: list[dict[str, Any]]) -> float:
    return statistics.median(answer["seconds"] for answer in answers)


def peak_bytes(answers: list[dict[str, Any]]) -> int:
    """Return the largest peak of a side; 0 on a CPU, where it is not measured."""
    return max(answer.get("peak_bytes", 0) for answer in answers)


def ratio(answers: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Return the median ratio of neighboring rounds, and its range."""
    if not base:
        return "-"
    values = [one["seconds"] / other["seconds"] for one, other in zip(answers, base, strict=False)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def line(figures: dict[str, Any]) -> str:
    parts = []
    for network, found in figures.items():
        shown = [
            f"{side} {seconds(rounds):.2f} s" + (f" {peak_bytes(rounds) / GIB:.1f} GiB" if peak_bytes(rounds) else "")
            for side, rounds in found["answers"].items()
            if rounds
        ]
        failed = [f"{side}: {error}" for side, error in found["errors"].items()]
        parts.append(f"{network}: {', '.join([*shown, *failed])}")
    return "; ".join(parts)


def page(figures: dict[str, Any]) -> str:
    return INTRODUCTION + sections(figures, "TRL's loop", "floor")


INTRODUCTION = """\
A round samples one batch and makes one update: SD 1.5 with 4 images of 512 x 512, SDXL with one of 1024 x 1024, both
with 5 steps and guidance, random weights in bfloat16 and an adapter of rank 4 in float32. *Floor* is the denoiser
alone, as often as sampling and training call it. *TRL's loop* has the operations of TRL 0.23.1's trainer. Ratios are
medians of neighboring rounds, with their range; memory is the most that PyTorch allocated per round, weights
included.
"""


def sections(figures: dict[str, Any], *bases: str) -> str:
    """Format a table for each network, with ratios to some of its sides."""
    parts = []
    for network, found in figures.items():
        answers = found["answers"]
        rows = [
            [
                side,
                f"{seconds(rounds):.3f}",
                *(ratio(rounds, answers[base]) for base in bases),
                f"{peak_bytes(rounds) / GIB:.2f}" if peak_bytes(rounds) else "-",
            ]
            for side, rounds in answers.items()
            if rounds
        ]
        failed = "".join(f"- {side} did not run: {error}\n" for side, error in found["errors"].items())
        heading = ["", "seconds per round", *(f"relative to {base}" for base in bases), "peak, GiB"]
        parts.append(f"\n**{network}**\n\n{table(heading, rows)}\n{failed}")
    return "".join(parts)
