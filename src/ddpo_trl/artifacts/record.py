"""Files of a run in addition to its weights: metrics, images, settings, environment."""

import csv
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from PIL import Image
from torch import Tensor
from transformers import TrainingArguments

from ddpo_trl.artifacts.checkpoints import CONFIG_NAME
from ddpo_trl.artifacts.environment import environment
from ddpo_trl.artifacts.plots import ImageRow, save_comparison
from ddpo_trl.policy.adapter_files import LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME
from ddpo_trl.rewards.model import as_pictures


METRICS_NAME = "metrics.csv"
ENVIRONMENT_NAME = "environment.json"
REWARD_CURVE_NAME = "reward.png"
BEFORE_AFTER_NAME = "before_after.png"
SAMPLES_FOLDER = "samples"
SAMPLES_NAME = "samples.json"

# The trained model in each of its forms, with the settings. The folders contain a whole denoiser.
MODEL_NAMES = (LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME, "unet", "transformer", CONFIG_NAME)

# Everything that belongs to one run and must not be mixed with the next one in the same folder.
RUN_NAMES = (
    METRICS_NAME, ENVIRONMENT_NAME, REWARD_CURVE_NAME, BEFORE_AFTER_NAME, SAMPLES_FOLDER, *MODEL_NAMES, "README.md",
    "report.html", "train.yaml", "summary.json",
)  # fmt: skip

Kind = Literal["fixed", "best", "median", "worst"]

GIF_FRAME_MILLISECONDS = 125


@dataclass(frozen=True, kw_only=True)
class LoggedImage:
    """
    Image that is shown, with its prompt, seed and rewards.

    Args:
        kind (`"fixed"`, `"best"`, `"median"` or `"worst"`):
            A fixed prompt and seed, or the rank of a sample in its round by reward.
        index (`int`):
            Number among the images of the same kind, from 0.
        frames (`Sequence[PIL.Image.Image]`):
            One image, or the frames of a video.
        prompt (`str`):
            The prompt.
        seed (`int`):
            Seed of its random generator.
        reward (`float`, *optional*):
            Weighted sum of the reward functions; `None` if it is not valid.
        rewards (`dict[str, float | None]`):
            Rewards by function.
    """

    kind: Kind
    index: int
    frames: Sequence[Image.Image]
    prompt: str
    seed: int
    reward: float | None
    rewards: dict[str, float | None]

    @property
    def still(self) -> Image.Image:
        """The image, or the middle frame of a video."""
        return self.frames[len(self.frames) // 2]

    @property
    def name(self) -> str:
        """Name in all rounds, such as `fixed-03` or `best-0`."""
        return f"fixed-{self.index:02d}" if self.kind == "fixed" else f"{self.kind}-{self.index}"


def frames(image: Tensor) -> list[Image.Image]:
    """Convert an image `(3, H, W)` or a video `(F, 3, H, W)` in [0, 1] to 8 bits; values outside are clipped."""
    return as_pictures((image if image.ndim == 4 else image[None]).nan_to_num())


def valid(reward: float) -> float | None:
    """Return `None` for NaN, which marks an invalid reward and does not exist in JSON."""
    return None if math.isnan(reward) else reward


def has_rounds(directory: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains the metrics of at least one round."""
    metrics = Path(directory, METRICS_NAME)
    return metrics.is_file() and len(metrics.read_text().splitlines()) > 1


# ---- Metrics ----


def write_metrics(directory: str | os.PathLike[str], log_history: Sequence[dict[str, Any]], steps: int) -> None:
    """
    Write `metrics.csv` again: one row per training log, with rounds of `steps` optimizer steps. A column that appears
    later is empty in earlier rows.
    """
    rows = metrics_rows(log_history, steps)
    columns = dict.fromkeys(["round", *(name for row in rows for name in row)])
    unfinished = Path(directory, f"_{METRICS_NAME}")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, Path(directory, METRICS_NAME))  # readers find either the old file or the new one


def metrics_rows(log_history: Sequence[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """
    Return a row per training log, with the evaluation of its round. An evaluation of another round than that of the
    last row, or a second one of the same round, has its own row.
    """
    rows: list[dict[str, Any]] = []
    for log in log_history:
        round = math.ceil(log["step"] / steps)
        evaluation = {name: value for name, value in log.items() if name.startswith("eval_")}
        if "loss" in log:
            rows.append({"round": round, **log})
        elif evaluation and rows and rows[-1]["round"] == round and not rows[-1].keys() & evaluation.keys():
            rows[-1] |= evaluation
        elif evaluation:
            rows.append({"round": round, "episode": log["episode"], "step": log["step"], **evaluation})
    return rows


# ---- Images ----


def round_folder(directory: str | os.PathLike[str], round: int) -> Path:
    """Return the folder of a round's images."""
    return Path(directory, SAMPLES_FOLDER, f"round-{round:04d}")


def write_samples(directory: str | os.PathLike[str], round: int, images: Sequence[LoggedImage]) -> None:
    """Write the images of a round, 0 before training: PNG files (and GIF files of videos) with `samples.json`."""
    folder = round_folder(directory, round)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = []
    for image in images:
        image.still.save(folder / f"{image.name}.png")
        if len(image.frames) > 1:
            first, *others = image.frames
            path = folder / f"{image.name}.gif"
            first.save(path, save_all=True, append_images=others, duration=GIF_FRAME_MILLISECONDS, loop=0)
        entries.append(
            {
                "kind": image.kind,
                "file": f"{image.name}.png",
                "prompt": image.prompt,
                "seed": image.seed,
                "reward": image.reward,
                "rewards": image.rewards,
            }
        )
    (folder / SAMPLES_NAME).write_text(json.dumps(entries, indent=2) + "\n")  # last: it marks a complete folder


def remove_rounds_from(directory: str | os.PathLike[str], round: int) -> None:
    """Remove the images of this round and of later ones, which the run will make again."""
    for folder in Path(directory, SAMPLES_FOLDER).glob("round-[0-9]*/"):
        if int(folder.name.removeprefix("round-")) >= round:
            shutil.rmtree(folder)


def fixed_images(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the entries of the fixed images in a round's folder by prompt and seed; empty if there is none."""
    path = folder / SAMPLES_NAME
    entries = json.loads(path.read_text()) if path.is_file() else []
    return {(entry["prompt"], entry["seed"]): entry for entry in entries if entry["kind"] == "fixed"}


def write_before_after(directory: str | os.PathLike[str], round: int) -> None:
    """Draw `before_after.png`: images of round 0 above those of `round` with the same prompts and seeds, if any."""
    folders = {"before": round_folder(directory, 0), "after": round_folder(directory, round)}
    entries = {title: fixed_images(folder) for title, folder in folders.items()}
    shared = [key for key in entries["before"] if key in entries["after"]]
    if not shared:
        return
    rows = [
        ImageRow(
            title=title,
            images=[Image.open(folder / entries[title][key]["file"]) for key in shared],
            rewards=[entries[title][key]["reward"] for key in shared],
        )
        for title, folder in folders.items()
    ]
    save_comparison(rows, [prompt for prompt, _ in shared], Path(directory, BEFORE_AFTER_NAME))


# ---- Settings and environment ----


def write_settings(directory: str | os.PathLike[str], settings: TrainingArguments) -> None:
    """Write `ddpo_config.json`, without tokens."""
    Path(directory, CONFIG_NAME).write_text(settings.to_json_string())


def write_environment(directory: str | os.PathLike[str], device: torch.device) -> None:
    """Write `environment.json`, see [`~ddpo_trl.artifacts.environment.environment`]."""
    Path(directory, ENVIRONMENT_NAME).write_text(json.dumps(environment(device), indent=2) + "\n")
