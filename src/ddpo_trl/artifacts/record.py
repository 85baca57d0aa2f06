"""Files of a run besides its weights: figures, sample images, pictures, settings, environment."""

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
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
from ddpo_trl.artifacts.plots import ImageRow, Picture, save_comparison, save_reward_curve, save_sheet
from ddpo_trl.policy.adapter_files import LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME
from ddpo_trl.rewards.model import as_pictures


METRICS_NAME = "metrics.csv"
ENVIRONMENT_NAME = "environment.json"
REWARD_CURVE_NAME = "reward.png"
BEFORE_AFTER_NAME = "before_after.png"
SAMPLES_FOLDER = "samples"
SAMPLES_NAME = "samples.json"

# What is saved at the end of a run: the trained weights in each form, with what describes them.
RESULTS = [
    LORA_WEIGHTS_NAME, PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME, "unet", "transformer", CONFIG_NAME, "README.md",
    "report.html", "train.yaml", "summary.json",
]  # fmt: skip

Kind = Literal["fixed", "best", "median", "worst"]

# In this order on a sheet.
SECTIONS: dict[Kind, str] = {"fixed": "same prompts and seeds", "best": "best", "median": "median", "worst": "worst"}

# Of a video's GIF.
FRAME_MILLISECONDS = 125


@dataclass(frozen=True, kw_only=True)
class LoggedImage:
    """
    An image that is shown, with what it was made from and what it got.

    Args:
        kind (`"fixed"`, `"best"`, `"median"` or `"worst"`):
            One of the fixed prompts and seeds, or a sample of the round and its place among them by reward.
        index (`int`):
            Counts the images of a kind, from 0.
        frames (`Sequence[PIL.Image.Image]`):
            One, or those of a video.
        prompt (`str`):
            The prompt.
        seed (`int`):
            Seed of its random generator.
        reward (`float`, *optional*):
            Weighted sum of the reward functions, `None` if one gave no valid reward.
        rewards (`dict[str, float | None]`):
            By reward function.
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
        """The image, or the frame in the middle of a video."""
        return self.frames[len(self.frames) // 2]

    @property
    def name(self) -> str:
        """The same for all rounds: `fixed-03`, `best-0`."""
        return f"fixed-{self.index:02d}" if self.kind == "fixed" else f"{self.kind}-{self.index}"


def frames(image: Tensor) -> list[Image.Image]:
    """
    An image, or a video's frames, with 8 bits per channel.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`, or `(F, 3, H, W)` for video):
            Float in [0, 1]; what is beyond is cut off.
    """
    return as_pictures((image if image.ndim == 4 else image[None]).nan_to_num())


def valid(reward: float) -> float | None:
    """`None` instead of NaN, which stands for no valid reward and is no JSON."""
    return None if math.isnan(reward) else reward


def run_files(directory: str | os.PathLike[str]) -> list[str]:
    """Names of what a run has recorded and saved in a folder; none if not even a round was logged."""
    metrics = Path(directory, METRICS_NAME)
    if not metrics.is_file() or len(metrics.read_text().splitlines()) < 2:
        return []
    return [METRICS_NAME, ENVIRONMENT_NAME, REWARD_CURVE_NAME, BEFORE_AFTER_NAME, SAMPLES_FOLDER, *RESULTS]


# ---- Figures ----


def write_metrics(directory: str | os.PathLike[str], log_history: Sequence[dict[str, Any]], steps: int) -> None:
    """
    Write `metrics.csv` again: one row per training log. A column that comes up later is empty before.

    Args:
        directory (`str` or `os.PathLike`):
            Of the run.
        log_history (`Sequence[dict]`):
            The Trainer's logs.
        steps (`int`):
            Optimizer steps of a round, by which a log's round is known.
    """
    rows = metrics_rows(log_history, steps)
    columns = dict.fromkeys(["round", *(name for row in rows for name in row)])
    path = Path(directory, METRICS_NAME)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)  # a reader finds either the old file or the new one


def metrics_rows(log_history: Sequence[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """
    Return a row per training log, with the evaluation of its round. An evaluation of another round than that of the
    last row, or a second one of the same round, has its own row.
    """
    rows: list[dict[str, Any]] = []
    for log in log_history:
        round = math.ceil(log["step"] / steps)
        figures = {name: value for name, value in log.items() if name.startswith("eval_")}
        if "loss" in log:
            rows.append({"round": round, **log})
        elif figures and rows and rows[-1]["round"] == round and not rows[-1].keys() & figures.keys():
            rows[-1] |= figures
        elif figures:
            rows.append({"round": round, "episode": log["episode"], "step": log["step"], **figures})
    return rows


# ---- Images ----


def round_folder(directory: str | os.PathLike[str], round: int) -> Path:
    """Where the images of a round are; its sheet is beside it."""
    return Path(directory, SAMPLES_FOLDER, f"round-{round:04d}")


def write_samples(directory: str | os.PathLike[str], round: int, images: Sequence[LoggedImage]) -> None:
    """
    Writes the images of a round: a folder of PNG files (and GIF files of videos) with `samples.json`, and a sheet.

    Args:
        directory (`str` or `os.PathLike`):
            Of the run.
        round (`int`):
            Rounds done; 0 is before training.
        images (`Sequence[LoggedImage]`):
            The images.
    """
    folder = round_folder(directory, round)
    remove_samples(folder)
    folder.mkdir(parents=True)
    for image in images:
        image.still.save(folder / f"{image.name}.png")
        if len(image.frames) > 1:
            first, *others = image.frames
            first.save(
                folder / f"{image.name}.gif", save_all=True, append_images=others, duration=FRAME_MILLISECONDS, loop=0
            )
    sections = {
        label: [
            Picture(image=image.still, prompt=image.prompt, reward=image.reward)
            for image in images
            if image.kind == kind
        ]
        for kind, label in SECTIONS.items()
    }
    title = f"Round {round}" if round else "Before training"
    save_sheet({label: some for label, some in sections.items() if some}, title, folder.with_suffix(".png"))
    entries = [
        {
            "kind": image.kind,
            "file": f"{image.name}.png",
            "prompt": image.prompt,
            "seed": image.seed,
            "reward": image.reward,
            "rewards": image.rewards,
        }
        for image in images
    ]
    (folder / SAMPLES_NAME).write_text(json.dumps(entries, indent=2) + "\n")  # last: what has it is complete


def remove_samples(folder: Path) -> None:
    """A round's images and their sheet, if they are there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".png").unlink(missing_ok=True)


def remove_rounds_from(directory: str | os.PathLike[str], round: int) -> None:
    """Removes the images of this round and of later ones: they are of another run, or will be made again."""
    for folder in Path(directory, SAMPLES_FOLDER).glob("round-*"):
        number = re.fullmatch(r"round-(\d{4,})", folder.name)
        if number and int(number[1]) >= round:
            remove_samples(folder)


def fixed_images(folder: Path) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """The entries of the fixed images in a round's folder, by prompt and seed; none if it is not there."""
    path = folder / SAMPLES_NAME
    for entry in json.loads(path.read_text()) if path.is_file() else []:
        if entry["kind"] == "fixed":
            yield (entry["prompt"], entry["seed"]), entry


def write_before_after(directory: str | os.PathLike[str], round: int) -> None:
    """
    Draws `before_after.png` from the images on the disk: those of round 0 above those of `round`, where prompt and
    seed are the same. Nothing if there are none.

    Args:
        directory (`str` or `os.PathLike`):
            Of the run.
        round (`int`):
            The round to compare with round 0.
    """
    folders = {"before": round_folder(directory, 0), "after": round_folder(directory, round)}
    before, after = (dict(fixed_images(folder)) for folder in folders.values())
    shared = [of for of in before if of in after]
    if not shared:
        return
    rows = [
        ImageRow(
            title=title,
            images=[Image.open(folder / entries[of]["file"]) for of in shared],
            rewards=[entries[of]["reward"] for of in shared],
        )
        for (title, folder), entries in zip(folders.items(), (before, after), strict=True)
    ]
    save_comparison(rows, [prompt for prompt, _ in shared], Path(directory, BEFORE_AFTER_NAME))


def write_reward_curve(
    directory: str | os.PathLike[str], log_history: Sequence[dict[str, Any]], reward_names: Sequence[str]
) -> None:
    """
    Draws `reward.png`; nothing before the first round is logged.

    Args:
        directory (`str` or `os.PathLike`):
            Of the run.
        log_history (`Sequence[dict]`):
            The Trainer's logs.
        reward_names (`Sequence[str]`):
            Of the reward functions. A single one gives the vertical axis its name.
    """
    if any("reward" in log for log in log_history):
        label = reward_names[0] if len(reward_names) == 1 else "reward"
        save_reward_curve(log_history, Path(directory, REWARD_CURVE_NAME), label)


# ---- Settings and environment ----


def write_settings(directory: str | os.PathLike[str], settings: TrainingArguments) -> None:
    """Writes `ddpo_config.json`. Tokens are left out."""
    Path(directory, CONFIG_NAME).write_text(settings.to_json_string())


def write_environment(directory: str | os.PathLike[str], device: torch.device) -> None:
    """Writes `environment.json`, see [`~ddpo_trl.artifacts.environment.environment`]."""
    Path(directory, ENVIRONMENT_NAME).write_text(json.dumps(environment(device), indent=2) + "\n")
