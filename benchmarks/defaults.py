"""
Comparison of default values on the embedded pipeline: `python benchmarks/defaults.py`.

A preliminary comparison with seed 0 had one, two and four updates per round, learning rates of 3e-4 and 1e-3, and
advantages by round and by prompt (figures in docs/objective.md). It selected the settings that this script compares
with three seeds: one update, 3e-4 and advantages by round, as in TRL 0.23; and advantages by prompt at 1e-3, with one
update and with four. All have 512 reward queries in 4 rounds of 128, IS, and the reward `emoji_alignment`. The result
is the gain of the evaluation reward on 256 images of fixed prompts and seeds, per 1000 queries and per CPU minute of
training (`time.process_time`, which other work on the machine hardly changes), with the lowest and the highest seed.
Runs are kept in outputs/defaults, so the command is resumable.

A value becomes the default if its mean is better both per query and per CPU minute; this rule was written before the
first run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo_runs import make_all
from rounds import ROOT


FOLDER = ROOT / "outputs/defaults"
SEEDS = (0, 1, 2)
COMMON = [
    "--reward", "emoji_alignment", "--use_cpu", "true", "--num_train_epochs", "4", "--stop_at_gain", "9",
    "--num_sample_batches", "8", "--log_images_rounds", "0",
]  # fmt: skip

SETTINGS = {
    f"{updates} per round, {rate}, {normalization}": (
        f"--num_mini_batches {updates} --learning_rate {rate} --advantage_normalization {normalization} "
        "--num_images_per_prompt 1"
    ).split()
    for updates, rate, normalization in ((1, "3e-4", "batch"), (1, "1e-3", "prompt"), (4, "1e-3", "prompt"))
}


def folder(flags: Sequence[str], seed: int) -> Path:
    """Folder of a run, named after its flags."""
    return FOLDER / f"{'_'.join(flag.removeprefix('--') for flag in flags)}_seed_{seed}"


def figures(flags: Sequence[str]) -> dict[str, list[float]]:
    """Return the gain per 1000 queries and per CPU minute, and the change of the recognized share, for each seed."""
    found: dict[str, list[float]] = {"query": [], "minute": [], "recognized": []}
    for seed in SEEDS:
        summary: dict[str, Any] = json.loads((folder(flags, seed) / "summary.json").read_text())
        gain = summary["eval_reward_gain"]
        found["query"].append(1000 * gain / summary["reward_queries"])
        found["minute"].append(60 * gain / summary["seconds"]["training_cpu"])
        found["recognized"].append(summary["recognized_gain"])
    return found


def shown(values: Sequence[float], digits: int) -> str:
    """Format the mean, the lowest and the highest value."""
    mean = sum(values) / len(values)
    return f"{mean:+.{digits}f} ({min(values):+.{digits}f} to {max(values):+.{digits}f})"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    make_all(
        {folder(flags, seed): [*COMMON, *flags, "--seed", str(seed)] for seed in SEEDS for flags in SETTINGS.values()}
    )
    table = Table(
        "updates, learning rate, advantages",
        "gain per 1000 queries",
        "gain per CPU minute",
        "recognized",
        title="emoji_alignment, nats",
    )
    for name, flags in SETTINGS.items():
        found = figures(flags)
        table.add_row(name, shown(found["query"], 2), shown(found["minute"], 2), shown(found["recognized"], 2))
    Console(width=119).print(table)


if __name__ == "__main__":
    main()
