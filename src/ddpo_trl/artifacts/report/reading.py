"""Files of a run, read for the report."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpo_trl.artifacts.record import CONFIG_NAME, ENVIRONMENT_NAME, METRICS_NAME, SAMPLES_FOLDER, SAMPLES_NAME
from ddpo_trl.artifacts.report.numbers import finite, number, short
from ddpo_trl.artifacts.report.pictures import Picture, longest_side, picture


SAMPLES_PATTERN = f"{SAMPLES_FOLDER}/round-*/{SAMPLES_NAME}"

# What the page takes from which files.
PARTS = {
    "curves and time split": METRICS_NAME,
    "samples": SAMPLES_PATTERN,
    "settings": CONFIG_NAME,
    "environment": ENVIRONMENT_NAME,
}

# More would make a page too large to be sent around.
MAX_ROUNDS = 24

# A line of metrics.csv, without its empty cells.
Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A logged image. `change` is its reward less that of the same prompt and seed in the first round shown."""

    kind: str
    file: str
    prompt: str
    seed: int
    reward: float | None
    rewards: dict[str, float | None]
    picture: Picture | None
    change: float | None

    @property
    def alt(self) -> str:
        """The image in words."""
        return f"{self.prompt}; reward {short(self.reward)}"


@dataclass(frozen=True, kw_only=True)
class Round:
    """The logged images of a round. Round 0 is before training; `queries` are those made until its end."""

    index: int
    queries: float | None
    samples: list[Sample]

    @property
    def fixed(self) -> list[Sample]:
        """The images that every round makes from the same prompts and seeds."""
        return [sample for sample in self.samples if sample.kind == "fixed"]

    @property
    def extremes(self) -> dict[str, list[Sample]]:
        """Images of the round, by their place among its rewards."""
        places = {kind: [each for each in self.samples if each.kind == kind] for kind in ("best", "median", "worst")}
        return {kind: samples for kind, samples in places.items() if samples}

    @property
    def fixed_reward(self) -> float | None:
        """Mean reward of the fixed images."""
        rewards = [reward for sample in self.fixed if (reward := finite(sample.reward)) is not None]
        return sum(rewards) / len(rewards) if rewards else None

    @property
    def title(self) -> str:
        """The round in words."""
        return f"Round {self.index}" if self.index else "Before training"

    @property
    def label(self) -> str:
        """Label of the round on the slider."""
        queries = f"{number(self.queries)} reward queries" if self.queries else ""
        reward = "" if self.fixed_reward is None else f"mean reward {short(self.fixed_reward)}"
        return " · ".join(filter(None, [self.title, queries, reward]))


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    What was found in a folder.

    Args:
        name (`str`):
            Of the folder.
        rows (`list[dict[str, float]]`):
            One per round, from `metrics.csv`.
        rounds (`list[Round]`):
            The rounds whose images are shown, of `logged_rounds` that have some.
        side (`int`):
            The longest side of an image, in pixels.
        settings, environment (`dict`, *optional*):
            What the files of these names hold.
        missing (`list[str]`):
            What is not there, in words.
    """

    name: str
    rows: list[Row]
    rounds: list[Round]
    logged_rounds: int
    side: int
    settings: dict[str, Any] | None
    environment: dict[str, Any] | None
    missing: list[str]


def read_run(directory: Path) -> Run:
    """Reads all that there is, images included; a `ValueError` if there is nothing."""
    missing = [f"{part}: no {pattern}" for part, pattern in PARTS.items() if not any(directory.glob(pattern))]
    if len(missing) == len(PARTS):
        raise ValueError(
            f"{directory} holds nothing of a run: there is no {', '.join(PARTS.values())}. Give the output_dir of a "
            "run."
        )
    rows = read_metrics(directory / METRICS_NAME, missing)
    logged = sorted(directory.glob(SAMPLES_PATTERN), key=round_index)
    records = {path: read_json(path, missing) for path in evenly_spaced(logged)}
    rounds, side = read_rounds({path: samples for path, samples in records.items() if samples is not None}, rows)
    unreadable = [sample.file for one in rounds for sample in one.samples if sample.picture is None]
    if unreadable:
        missing.append(f"{len(unreadable)} of the samples' images can't be read, such as {unreadable[0]}")
    return Run(
        name=directory.resolve().name,
        rows=rows,
        rounds=rounds,
        logged_rounds=len(logged),
        side=side,
        settings=read_json(directory / CONFIG_NAME, missing),
        environment=read_json(directory / ENVIRONMENT_NAME, missing),
        missing=missing,
    )


def read_json(path: Path, missing: list[str]) -> Any:
    """`None` if there is no such file, or half of one: the run may have ended while it was written."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        missing.append(f"{path.parent.name}/{path.name} is not complete ({error})")
        return None


def read_metrics(path: Path, missing: list[str]) -> list[Row]:
    """The rows of `metrics.csv`; a `ValueError` if no run wrote it."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
        except ValueError as error:
            raise ValueError(f"{path} is not the metrics.csv of a run: {error}.") from error
    if not all({"round", "episode"} <= row.keys() for row in rows):
        raise ValueError(f"{path} is not the metrics.csv of a run: a row has no `round` or no `episode`.")
    if not rows:
        missing.append(f"curves and time split: {METRICS_NAME} has no round yet")
    return rows


def round_index(path: Path) -> int:
    """Of `samples/round-0010/samples.json`: 10."""
    return int(path.parent.name.removeprefix("round-"))


def evenly_spaced(paths: Sequence[Path]) -> list[Path]:
    """At most [`MAX_ROUNDS`] of them, with the first and the last."""
    if len(paths) <= MAX_ROUNDS:
        return list(paths)
    return [paths[place * (len(paths) - 1) // (MAX_ROUNDS - 1)] for place in range(MAX_ROUNDS)]


def read_rounds(records: dict[Path, list[dict[str, Any]]], rows: Sequence[Row]) -> tuple[list[Round], int]:
    """The rounds with their images, and the longest side of an image in pixels."""
    queries = {0: 0.0} | {int(row["round"]): row["episode"] for row in rows}
    side = longest_side([image_path(path, entry) for path, entries in records.items() for entry in entries])
    first: dict[tuple[str, int], float] = {}  # rewards of the fixed prompts and seeds where they are met first
    rounds = []
    for path, entries in records.items():
        index = round_index(path)
        samples = [read_sample(path, entry, side, first) for entry in entries]
        rounds.append(Round(index=index, queries=queries.get(index), samples=samples))
    return rounds, side


def image_path(path: Path, entry: dict[str, Any]) -> Path:
    """The image of an entry of `samples.json`: of a video the GIF, which is beside the picture of its middle."""
    still = path.with_name(Path(entry["file"]).name)
    video = still.with_suffix(".gif")
    return video if video.is_file() else still


def read_sample(path: Path, entry: dict[str, Any], side: int, first: dict[tuple[str, int], float]) -> Sample:
    """An entry of `samples.json` with its image."""
    change = None
    key, reward = (entry["prompt"], entry["seed"]), finite(entry["reward"])
    if entry["kind"] == "fixed" and reward is not None:
        change = reward - first[key] if key in first else None
        first.setdefault(key, reward)
    return Sample(
        kind=entry["kind"],
        file=entry["file"],
        prompt=entry["prompt"],
        seed=entry["seed"],
        reward=reward,
        rewards=entry["rewards"],
        picture=picture(image_path(path, entry), side),
        change=change,
    )
