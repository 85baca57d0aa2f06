"""Charts of the report, selected from the columns of `metrics.csv`."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ddpo_trl.artifacts.report.numbers import finite, number
from ddpo_trl.artifacts.report.reading import Row


# Headings and units. Other columns are shown under their own names.
TITLES = {
    "policy/approxkl_avg": ("Distance from the sampling policy", "mean of ½·(log r)², nats²"),
    "policy/clipfrac_avg": ("Clipped ratios", "share of the samples"),
    "policy/updates_skipped": ("Updates skipped by target_kl", "share of the updates"),
    "objective/kl": ("KL to the starting model", "nats, reduced as log-probabilities are"),
    "val/ratio": ("Ratio", "mean of r, 1 on policy"),
    "val/ratio_deviation": ("Replay against sampling", "largest |r − 1| before any update"),
    "loss": ("Loss", "mean over the updates"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", "of the optimizer"),
    "rewards/invalid": ("Invalid rewards", "share of the round's images"),
    "frac_reward_zero_std": ("Groups of equal rewards", "share of the groups compared"),
    "eps": ("Throughput", "reward queries per second"),
    "eval_reward": ("Evaluation reward", "mean ± one standard deviation"),
    "eval_reward_sde_gap": ("Gap to the training sampler", "its reward minus the evaluation's"),
    "eval_diversity": ("Diversity", "distance of images of a prompt, 0 to 1"),
}

# Columns that locate a row, spreads of other columns, and columns with their own section.
PLACES = ("round", "episode", "epoch", "step")
SPREADS = ("/std", "_std")
TIMES = ("time/", "eps")

# Parts of a round, in order.
PHASES = {
    "Sampling": "time/sampling",
    "Training": "time/training",
    "Waiting for rewards": "time/waiting_for_rewards",
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines against reward queries; `spread`, if any, is the half-width of a band around the first line."""

    key: str
    title: str
    unit: str
    queries: list[float]
    lines: dict[str, list[float]]
    spread: list[float | None] | None = None

    @property
    def constant(self) -> float | None:
        """The value if it is the same in all rounds, so that there is no curve to draw."""
        values = {value for line in self.lines.values() for value in line}
        return min(values) if len(values) == 1 else None

    @property
    def description(self) -> str:
        """Text alternative of the chart."""
        lines = [
            f"{name} from {number(values[0])} to {number(values[-1])}, lowest {number(min(values))}, highest "
            f"{number(max(values))}"
            for name, values in self.lines.items()
        ]
        span = f"{number(self.queries[0])} to {number(self.queries[-1])} reward queries"
        return f"{self.title} ({self.unit}) over {span}: {'; '.join(lines)}."


class Phase(NamedTuple):
    """Part of the time of a run; `share` is in [0, 1]."""

    name: str
    seconds: float
    share: float


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the names with at least one finite number, in order."""
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if math.isfinite(value)))


def curve(rows: Sequence[Row], column: str, title: str = "", unit: str = "") -> Chart:
    """Return the chart of a column, with the standard deviation that is logged with it."""
    known = [row for row in rows if finite(row.get(column)) is not None]
    spread_column = f"{column.removesuffix('/mean')}/std" if column.endswith("/mean") else f"{column}_std"
    spread = [finite(row.get(spread_column)) for row in known]
    default_title, default_unit = TITLES.get(column, (column, "mean of the round"))
    return Chart(
        key=column,
        title=title or default_title,
        unit=unit or default_unit,
        queries=[row["episode"] for row in known],
        lines={title or default_title: [row[column] for row in known]},
        spread=spread if any(value is not None for value in spread) else None,
    )


def function_names(rows: Sequence[Row], prefix: str = "rewards/") -> dict[str, str]:
    """Return the names of the reward functions by the columns of their means."""
    means = [name for name in columns(rows) if name.startswith(prefix) and name.endswith("/mean")]
    return {column: column.removeprefix(prefix).removesuffix("/mean") for column in means}


def function_charts(rows: Sequence[Row], prefix: str) -> list[Chart]:
    """Return a chart per reward function; none if there is only one, whose reward is the sum."""
    names = function_names(rows, prefix)
    if len(names) < 2:
        return []
    return [curve(rows, column, name, "mean ± one standard deviation") for column, name in names.items()]


def reward_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the charts of the reward and of each reward function."""
    if "reward" not in columns(rows):
        return []
    names = list(function_names(rows).values())
    title = names[0] if len(names) == 1 else "Weighted sum of the rewards"
    total = curve(rows, "reward", title, "mean of the round's images, ± one standard deviation")
    return [total, *function_charts(rows, "rewards/")]


def evaluation_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the charts of the evaluations, without their duration."""
    skipped = (*SPREADS, "_runtime", "_per_second", "_loss")
    names = [name for name in columns(rows) if name.startswith("eval_") and not name.endswith(skipped)]
    shown = [curve(rows, name) for name in names if not name.startswith("eval_rewards/")]
    return shown + function_charts(rows, "eval_rewards/")


def policy_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the charts of all other columns: those of [`TITLES`] in their order, then the rest."""
    elsewhere = {"reward", *PLACES, *function_names(rows)}
    names = [
        name
        for name in columns(rows)
        if name not in elsewhere and not name.endswith(SPREADS) and not name.startswith(("eval_", *TIMES))
    ]
    return [curve(rows, name) for name in sorted(names, key=[*TITLES, *names].index)]


def seconds(rows: Sequence[Row], column: str) -> float:
    """Return the sum over all rounds."""
    return sum(row.get(column, 0.0) for row in rows)


def time_phases(rows: Sequence[Row]) -> list[Phase]:
    """Return the parts of the time; none if it was not measured."""
    totals = {name: seconds(rows, column) for name, column in PHASES.items()}
    whole = sum(totals.values())
    return [Phase(name, total, total / whole) for name, total in totals.items() if whole > 0]


def time_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the charts of seconds per round and of reward queries per second."""
    charts = [curve(rows, "eps")] if "eps" in columns(rows) else []
    timed = [row for row in rows if set(PHASES.values()) <= row.keys()]
    if timed:
        lines = {name: [row[column] for row in timed] for name, column in PHASES.items()}
        queries = [row["episode"] for row in timed]
        charts.insert(0, Chart(key="time", title="Time per round", unit="seconds", queries=queries, lines=lines))
    return charts


def as_data(charts: Sequence[Chart]) -> dict[str, dict]:
    """Return the data for the page's script by key."""
    return {chart.key: dataclasses.asdict(chart) for chart in charts}
