"""
Choice of the transitions to train on, reward against time: `python benchmarks/transitions.py`.

Compares several choices of the trained transitions on the demo's task, with three seeds each and the same number of
reward queries, and the time per round of each choice, in interleaved rounds. Takes half an hour on two cores. Finished
runs are kept in outputs/transitions and not repeated. Writes benchmarks/transitions-DATE.json. `--cost` measures only
the time, which needs a machine with nothing else running.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ddpo_trl import DDPOTrainer
from ddpo_trl.cli.demo import parse_arguments
from ddpo_trl.demo import demo_trainer
from demo_runs import make_all
from rounds import ROOT, log_of_a_round, machine


KEPT = ROOT / "outputs" / "transitions"
TASK = "jpeg_compressibility"
SEEDS = (0, 1, 2)
COMMON = [
    *("--bf16", "true", "--use_cpu", "true", "--num_sample_batches", "8", "--num_train_epochs", "4"),
    *("--stop_at_gain", "9", "--reward", TASK),
]


class Choice(NamedTuple):
    """A choice of the transitions to train on."""

    title: str
    flags: list[str]


# The sampler has five steps. The demo trains on the first three.
CHOICES = {
    "all": Choice("all 5 steps", ["--train_timestep_range", "0", "1"]),
    "std": Choice("all 5 steps, weighted by σ", ["--train_timestep_range", "0", "1", "--transition_weighting", "std"]),
    "first": Choice("the first 3", []),
    "fraction": Choice("1 of the first 3, drawn again each time", ["--timestep_fraction", "0.34"]),
    "window": Choice(
        "2 adjacent of the first 3, noise only in them", ["--sde_window_size", "2", "--sde_window_strategy", "random"]
    ),
}
BASE = "first"


def folder(choice: str, seed: int) -> Path:
    return KEPT / f"{choice}-{seed}"


# ---- Reward ----


def learned(choice: str) -> dict[str, list[float]]:
    """Return the figures of each seed."""
    summaries = [json.loads((folder(choice, seed) / "summary.json").read_text()) for seed in SEEDS]
    names = ("eval_reward_gain", "eval_reward_gain_stderr", "recognized_after")
    return {name: [summary[name] for summary in summaries] for name in names}


# ---- Time ----


def small_trainer(flags: Sequence[str]) -> DDPOTrainer:
    """Create the demo's trainer for a round of 32 images with two updates, at the demo's cost per image."""
    sizes = ["--num_train_epochs", "1", "--num_sample_batches", "2", "--num_mini_batches", "2"]
    quiet = ["--disable_tqdm", "true", "--log_images_rounds", "0", "--output_dir", str(KEPT / "cost")]
    arguments, config = parse_arguments([*COMMON, *flags, *sizes, *quiet])
    return demo_trainer(arguments, config)


def seconds_of_a_round(trainer: DDPOTrainer) -> float:
    log = log_of_a_round(trainer)
    return log["time/sampling"] + log["time/waiting_for_rewards"] + log["time/training"]


def costs(repeats: int) -> dict[str, list[float]]:
    """Measure the time per round of each choice, relative to the round of `BASE` in the same repeat."""
    trainers = {name: small_trainer(choice.flags) for name, choice in CHOICES.items()}
    relative: dict[str, list[float]] = {name: [] for name in CHOICES}
    for repeat in range(repeats + 1):
        seconds = {name: seconds_of_a_round(trainer) for name, trainer in trainers.items()}
        for name in CHOICES if repeat else ():  # the first is warm-up
            relative[name].append(seconds[name] / seconds[BASE])
    return relative


# ---- The table ----


def show(figures: dict[str, Any]) -> None:
    table = Table(title=f"{TASK}, {figures['reward_queries']} reward queries, seeds {', '.join(map(str, SEEDS))}")
    for heading in ("trained on", "gain", "each seed", "recognized", "time per round", "gain per time"):
        table.add_column(heading, justify="left" if heading == "trained on" else "right")
    for name, values in figures["choices"].items():
        gains = values["eval_reward_gain"]
        table.add_row(
            values["title"],
            f"{statistics.mean(gains):+.3f}",
            " ".join(f"{gain:+.2f}" for gain in gains),
            f"{statistics.mean(values['recognized_after']):.0%}",
            f"{values['time']:.2f}",
            f"{values['gain_per_time']:.2f}" if name != BASE else "1",
        )
    Console(width=120).print(table)


def collect(repeats: int) -> dict[str, Any]:
    """Collect all figures for the JSON file."""
    relative = costs(repeats)
    choices: dict[str, dict[str, Any]] = {}
    for name, choice in CHOICES.items():
        times = relative[name]
        choices[name] = {
            "title": choice.title,
            "flags": choice.flags,
            **learned(name),
            "time": statistics.median(times),
            "time_from_to": [min(times), max(times)],
        }
    base = statistics.mean(choices[BASE]["eval_reward_gain"])
    for values in choices.values():
        values["gain_per_time"] = statistics.mean(values["eval_reward_gain"]) / base / values["time"]
    queries = json.loads((folder(BASE, SEEDS[0]) / "summary.json").read_text())["reward_queries"]
    return {"machine": machine(), "flags": COMMON, "reward_queries": queries, "choices": choices}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds per choice")
    parser.add_argument("--cost", action="store_true", help="measure only the time per round")
    arguments = parser.parse_args()
    if arguments.cost:
        return print(json.dumps(costs(arguments.repeats), indent=2))
    make_all(
        {
            folder(name, seed): [*COMMON, *choice.flags, "--seed", str(seed)]
            for seed in SEEDS
            for name, choice in CHOICES.items()
        }
    )
    figures = collect(arguments.repeats)
    show(figures)
    path = ROOT / "benchmarks" / f"transitions-{figures['machine']['date']}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
