"""Files of a run, read for the report."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpo_trl.artifacts.checkpoints import CONFIG_NAME
from ddpo_trl.artifacts.record import ENVIRONMENT_NAME, METRICS_NAME, SAMPLES_FOLDER, SAMPLES_NAME
from ddpo_trl.artifacts.report.numbers import finite, number, short
from ddpo_trl.artifacts.report.pictures import longest_side, picture


SAMPLES_PATTERN = f"{SAMPLES_FOLDER}/round-*/{SAMPLES_NAME}"

# Parts of the page and their files.
PARTS = {
    "curves and time split": METRICS_NAME,
    "samples": SAMPLES_PATTERN,
    "settings": CONFIG_NAME,
    "environment": ENVIRONMENT_NAME,
}

# Rounds with images; more would make the page too large to send.
MAX_ROUNDS = 24

Row = dict[str, float]  # of metrics.csv, without empty cells
Sample = dict[str, Any]  # entry of samples.json, with its picture


@dataclass(frozen=True, kw_only=True)
class Round:
    """Logged images of a round, with the reward queries made until its end. Round 0 is before training."""

    index: int
    queries: float | None
    samples: list[Sample]

    def of_kind(self, kind: str) -> list[Sample]:
        """Return the images of a kind, such as `"fixed"` or `"best"`."""
        return [sample for sample in self.samples if sample["kind"] == kind]

    @property
    def fixed_reward(self) -> float | None:
        """Mean reward of the fixed images."""
        rewards = [value for sample in self.of_kind("fixed") if (value := finite(sample["reward"])) is not None]
        return sum(rewards) / len(rewards) if rewards else None

    @property
    def title(self) -> str:
        """Name of the round."""
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
    Content of a run's folder: the rows of `metrics.csv`, the rounds whose images are shown (out of `logged_rounds`)
    with at most `side` pixels on the longest side, and sentences about missing and damaged files.
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
    """Read everything that exists, images included; raise a `ValueError` if there is nothing."""
    missing = [f"{part}: no {pattern}" for part, pattern in PARTS.items() if not any(directory.glob(pattern))]
    if len(missing) == len(PARTS):
        raise ValueError(
            f"{directory} is not the output_dir of a run: there is no {', '.join(PARTS.values())}. Give the "
            "output_dir of a run."
        )
    rows = read_metrics(directory / METRICS_NAME, missing)
    logged = sorted(directory.glob(SAMPLES_PATTERN), key=round_index)
    records = {path: read_json(path, missing) for path in evenly_spaced(logged)}
    rounds, side = read_rounds({path: entries for path, entries in records.items() if entries is not None}, rows)
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
    """Return the content of a file; `None` if there is none, or half of one: the run may have ended in between."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        missing.append(f"{path.parent.name}/{path.name} is not complete ({error})")
        return None


def read_metrics(path: Path, missing: list[str]) -> list[Row]:
    """Return the rows of `metrics.csv`; raise a `ValueError` if it is not the file of a run."""
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
    """Return 10 for `samples/round-0010/samples.json`."""
    return int(path.parent.name.removeprefix("round-"))


def evenly_spaced(paths: Sequence[Path]) -> list[Path]:
    """Select at most [`MAX_ROUNDS`], with the first and the last."""
    if len(paths) <= MAX_ROUNDS:
        return list(paths)
    return [paths[place * (len(paths) - 1) // (MAX_ROUNDS - 1)] for place in range(MAX_ROUNDS)]


def read_rounds(records: dict[Path, list[dict[str, Any]]], rows: Sequence[Row]) -> tuple[list[Round], int]:
    """Return the rounds with their images, and the longest side of an image in pixels."""
    queries = {0: 0.0} | {int(row["round"]): row["episode"] for row in rows}
    side = longest_side([image_path(path, entry) for path, entries in records.items() for entry in entries])
    rounds = []
    for path, entries in records.items():
        index = round_index(path)
        samples = [{**entry, "picture": picture(image_path(path, entry), side)} for entry in entries]
        rounds.append(Round(index=index, queries=queries.get(index), samples=samples))
    return rounds, side


def image_path(path: Path, entry: dict[str, Any]) -> Path:
    """Return the image of an entry of `samples.json`; for a video the GIF, next to the picture of its middle."""
    still = path.with_name(Path(entry["file"]).name)
    video = still.with_suffix(".gif")
    return video if video.is_file() else still
