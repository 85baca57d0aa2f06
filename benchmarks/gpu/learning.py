"""The demo on the device, in one pass and in two, and its control: with shuffled rewards nothing must be learned."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_runs import make_all
from gpu.setting import is_rehearsal, table
from rounds import ROOT


FOLDER = ROOT / "outputs" / "gpu" / "learning"

# One update per round has to be larger than each of four.
PASSES = {"two passes": [], "one pass": ["--one_pass", "true", "--learning_rate", "2e-3"]}
CONTROL = ["--shuffle_rewards", "true"]

# A rehearsal runs the commands and learns nothing.
SMALL = ["--use_cpu", "true", "--num_train_epochs", "1", "--num_sample_batches", "1", "--num_images_per_prompt", "4"]
SMALL += ["--num_inference_steps", "3"]


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    shutil.rmtree(FOLDER, ignore_errors=True)
    runs: dict[str, list[str]] = {}
    for name, flags in PASSES.items():
        runs[name] = flags
        runs[f"{name}, shuffled rewards"] = [*flags, *CONTROL]
    if is_rehearsal(device):  # each flag once
        runs = dict(list(runs.items())[::3])
    common = ["--disable_tqdm", "true", "--log_images_rounds", "0", *(SMALL if is_rehearsal(device) else [])]
    folders = {name: FOLDER / name.replace(", ", "-").replace(" ", "-") for name in runs}
    make_all({folders[name]: [*common, *flags] for name, flags in runs.items()})
    return {name: summary(folder) for name, folder in folders.items()}


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text())
    names = ["reward_queries", "eval_reward_before", "eval_reward_gain", "eval_reward_gain_stderr"]
    return {
        **{name: found[name] for name in [*names, "recognized_before", "recognized_after"]},
        "seconds": found["seconds"]["total"],
    }


def standard_errors(found: dict[str, Any]) -> float:
    return found["eval_reward_gain"] / found["eval_reward_gain_stderr"]


def line(figures: dict[str, Any]) -> str:
    gains = [f"{name} {standard_errors(found):+.1f}" for name, found in figures.items()]
    return f"gains in standard errors: {', '.join(gains)}"


def page(figures: dict[str, Any]) -> str:
    rows = [
        [
            name,
            found["reward_queries"],
            f"{found['eval_reward_before']:.3f}",
            f"{found['eval_reward_gain']:+.3f} ± {found['eval_reward_gain_stderr']:.3f}",
            f"{standard_errors(found):+.1f}",
            f"{found['recognized_before']:.0%} → {found['recognized_after']:.0%}",
            f"{found['seconds']:.0f}",
        ]
        for name, found in figures.items()
    ]
    heading = [
        "run",
        "reward queries",
        "before, kB",
        "gain",
        "in standard errors",
        "recognized",
        "seconds",
    ]
    return (
        "`ddpo-trl demo`: JPEG compressibility of the embedded pipeline, on fixed prompts and seeds; all runs at the "
        "same time. The suite requires at least 4 standard errors of a run that learns, and at most 2 of one with "
        f"shuffled rewards.\n\n{table(heading, rows)}"
    )
