"""
Good and bad runs for docs/metrics.md and docs/pitfalls.md: `python benchmarks/curves.py`.

Runs the demo several times (half an hour on two cores) and draws the logged metrics into docs/images. Logs and images
are kept in outputs/curves: a run that is already there is only drawn.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import numpy_to_pil
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ddpo_trl import DDPOTrainer
from ddpo_trl.artifacts.plots import ImageRow, save_comparison
from ddpo_trl.cli.demo import parse_arguments
from ddpo_trl.demo import demo_trainer
from rounds import ROOT


KEPT = ROOT / "outputs" / "curves"
PICTURES = ROOT / "docs" / "images"

# Flags of each run in addition to the demo's, and the color of its curve.
RUNS = {
    "1e-3, the demo's": (["--learning_rate", "1e-3"], "#1a7f37"),
    "3e-5": (["--learning_rate", "3e-5"], "#6e7781"),
    "1e-2": (["--learning_rate", "1e-2"], "#cf222e"),
    "1e-2, no clipping": (["--learning_rate", "1e-2", "--cliprange", "1e9"], "#8250df"),
}
ROUNDS = 8

PANELS = {
    "reward": ("reward", "linear"),
    "approxkl": ("policy/approxkl_avg", "log"),
    "clipfrac": ("policy/clipfrac_avg", "linear"),
    "ratio": ("val/ratio", "linear"),
}

# Without guidance and without early stopping, JPEG compressibility ends in blank images. Larger steps get there in
# fewer rounds.
HACKED = [
    *("--guidance_scale", "1.0", "--num_sample_batches", "4"),
    *("--learning_rate", "3e-3", "--num_train_epochs", "12"),
]
SHOWN_ROUNDS = (0, 3, 6, 12)
SHOWN_PROMPTS = ["mushroom", "hamburger", "snake", "strawberry", "pancakes", "honeybee"]


class ImagesOfRounds(TrainerCallback):
    """Keep images of the same prompts and seeds after the rounds in `SHOWN_ROUNDS`."""

    def __init__(self) -> None:
        self.trainer: DDPOTrainer
        self.images: dict[int, dict[str, torch.Tensor]] = {}

    def keep(self, round: int) -> None:
        samples = self.trainer.generate_samples(SHOWN_PROMPTS)
        self.images[round] = {"images": samples.images, "rewards": samples.rewards}

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (round := state.global_step // self.trainer.plan.updates_per_round) in SHOWN_ROUNDS:
            self.keep(round)


def train(options: Sequence[str], callbacks: list[TrainerCallback]) -> DDPOTrainer:
    """Create the demo's trainer with other options and without early stopping."""
    arguments, config = parse_arguments(["--output_dir", str(KEPT / "run"), *options])
    return demo_trainer(arguments, config, callbacks)


def logs_of(options: Sequence[str], path: Path) -> list[dict[str, float]]:
    """Return the logs of each round of a run."""
    if not path.exists():
        trainer = train(["--num_train_epochs", str(ROUNDS), *options], [])
        trainer.train()
        path.write_text(json.dumps([log for log in trainer.state.log_history if "reward" in log]))
    return json.loads(path.read_text())


def images_of_hacked(path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Return images and rewards after each of `SHOWN_ROUNDS`."""
    if not path.exists():
        keeper = ImagesOfRounds()
        keeper.trainer = train(HACKED, [keeper])
        keeper.keep(0)
        keeper.trainer.train()
        torch.save(keeper.images, path)
    return torch.load(path, weights_only=True)


def draw(runs: dict[str, list[dict[str, float]]], metric: str, scale: str, path: Path) -> None:
    """Draw a metric of all runs by round, large enough to read on a phone."""
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, logs in runs.items():
        rounds, values = range(1, len(logs) + 1), [log[metric] for log in logs]
        axes.plot(rounds, values, marker="o", markersize=3.5, color=RUNS[name][1], label=name)
    axes.set_yscale(scale)
    axes.set_title(metric, fontsize=12)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    KEPT.mkdir(parents=True, exist_ok=True)
    runs = {name: logs_of(options, KEPT / f"{index}.json") for index, (name, (options, _)) in enumerate(RUNS.items())}
    for file, (metric, scale) in PANELS.items():
        draw(runs, metric, scale, PICTURES / f"curves-{file}.png")
    images = images_of_hacked(KEPT / "hacked.pt")
    rows = [
        ImageRow(
            title=f"round {round}" if round else "before",
            images=numpy_to_pil(kept["images"].movedim(1, -1).numpy()),
            rewards=kept["rewards"][:, 0].tolist(),
        )
        for round, kept in sorted(images.items())
    ]
    save_comparison(rows, SHOWN_PROMPTS, PICTURES / "hacked.png")


if __name__ == "__main__":
    main()
