"""Which columns of `metrics.csv` become which charts."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ddpo_trl.artifacts.report.numbers import finite, number
from ddpo_trl.artifacts.report.reading import Row


# Headings and units. A column that is not here is shown under its own name.
TITLES = {
    "policy/approxkl_avg": ("Distance from the sampling policy", "mean of ½·(log r)², nats²"),
    "policy/clipfrac_avg": ("Clipped ratios", "share of the samples"),
    "policy/updates_skipped": ("Updates left out by target_kl", "share of the updates"),
    "objective/kl": ("KL to the starting model", "nats, reduced as log-probabilities are"),
    "val/ratio": ("Ratio", "mean of r, 1 on policy"),
    "val/ratio_deviation": ("Replay against sampling", "largest |r − 1| before any update"),
    "loss": ("Loss", "mean over the updates"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", "of the optimizer"),
    "rewards/invalid": ("Invalid rewards", "share of the round's images"),
    "frac_reward_zero_std": ("Groups of equal rewards", "share of the groups compared"),
    "eps": ("Throughput", "reward queries a second"),
    "eval_reward": ("Evaluation reward", "mean ± one standard deviation"),
    "eval_reward_sde_gap": ("Gap to the training sampler", "its reward less the evaluation's"),
    "eval_diversity": ("Diversity", "distance of images of a prompt, 0 to 1"),
}

# Columns that say where a row is, or that are the spread of another one, or that have a section of their own.
PLACES = ("round", "episode", "epoch", "step")
SPREADS = ("/std", "_std")
TIMES = ("time/", "eps")

# What a round does, one after the other.
PHASES = {
    "Sampling": "time/sampling",
    "Training": "time/training",
    "Waiting for rewards": "time/waiting_for_rewards",
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines against reward queries; around the first one a band of `spread` either way, if there is one."""

    key: str
    title: str
    unit: str
    queries: list[float]
    lines: dict[str, list[float]]
    spread: list[float | None] | None = None

    @property
    def description(self) -> str:
        """Text alternative of the chart."""
        told = [
            f"{name} from {number(values[0])} to {number(values[-1])}, lowest {number(min(values))}, highest "
            f"{number(max(values))}"
            for name, values in self.lines.items()
        ]
        span = f"{number(self.queries[0])} to {number(self.queries[-1])} reward queries"
        return f"{self.title} ({self.unit}) over {span}: {'; '.join(told)}."


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Part of the time of a run; `share` is in [0, 1]."""

    name: str
    seconds: float
    share: float


def columns(rows: Sequence[Row]) -> list[str]:
    """Select the names with at least one finite number, in order."""
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if math.isfinite(value)))


def curve(rows: Sequence[Row], column: str, title: str = "", unit: str = "") -> Chart:
    """A column, with the standard deviation that is logged beside it."""
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


def function_columns(rows: Sequence[Row], prefix: str) -> dict[str, str]:
    """Columns of the means of the reward functions, and the functions' names."""
    means = [name for name in columns(rows) if name.startswith(prefix) and name.endswith("/mean")]
    return {column: column.removeprefix(prefix).removesuffix("/mean") for column in means}


def curves_of_functions(rows: Sequence[Row], prefix: str) -> list[Chart]:
    """One per reward function; none if there is only one, whose reward is the sum."""
    names = function_columns(rows, prefix)
    if len(names) < 2:
        return []
    return [curve(rows, column, name, "mean ± one standard deviation") for column, name in names.items()]


def reward_names(rows: Sequence[Row]) -> list[str]:
    """The reward functions that the run trained for."""
    return list(function_columns(rows, "rewards/").values())


def reward_charts(rows: Sequence[Row]) -> list[Chart]:
    """The reward first, then each reward function."""
    if "reward" not in columns(rows):
        return []
    names = reward_names(rows)
    title = names[0] if len(names) == 1 else "Weighted sum of the rewards"
    total = curve(rows, "reward", title, "mean of the round's images, ± one standard deviation")
    return [total, *curves_of_functions(rows, "rewards/")]


def evaluation_charts(rows: Sequence[Row]) -> list[Chart]:
    """Figures of the evaluations, except their duration."""
    skipped = (*SPREADS, "_runtime", "_per_second", "_loss")
    figures = [
        name
        for name in columns(rows)
        if name.startswith("eval_") and not name.startswith("eval_rewards/") and not name.endswith(skipped)
    ]
    return [curve(rows, name) for name in figures] + curves_of_functions(rows, "eval_rewards/")


def policy_columns(rows: Sequence[Row]) -> list[str]:
    """All that has no section of its own: in the order of [`TITLES`], then what is not in it."""
    elsewhere = {"reward", *PLACES, *function_columns(rows, "rewards/")}
    found = [
        name
        for name in columns(rows)
        if name not in elsewhere and not name.endswith(SPREADS) and not name.startswith(("eval_", *TIMES))
    ]
    return sorted(found, key=[*TITLES, *found].index)


def constants(rows: Sequence[Row]) -> dict[str, float]:
    """Policy columns that are the same in all rounds: there is no curve to draw."""
    values = {name: {row[name] for row in rows if name in row} for name in policy_columns(rows)}
    return {name: min(found) for name, found in values.items() if len(found) == 1}


def policy_charts(rows: Sequence[Row]) -> list[Chart]:
    """How far the policy went and how the updates were."""
    same = constants(rows)
    return [curve(rows, name) for name in policy_columns(rows) if name not in same]


def seconds(rows: Sequence[Row], column: str) -> float:
    """In all rounds together."""
    return sum(row.get(column, 0.0) for row in rows)


def time_phases(rows: Sequence[Row]) -> list[Phase]:
    """The parts of the time, none if it was not measured."""
    totals = {name: seconds(rows, column) for name, column in PHASES.items()}
    whole = sum(totals.values())
    return [Phase(name=name, seconds=total, share=total / whole) for name, total in totals.items() if whole > 0]


def time_charts(rows: Sequence[Row]) -> list[Chart]:
    """Seconds of each round, and reward queries a second."""
    timed = [row for row in rows if set(PHASES.values()) <= row.keys()]
    charts = []
    if timed:
        lines = {name: [row[column] for row in timed] for name, column in PHASES.items()}
        queries = [row["episode"] for row in timed]
        charts.append(Chart(key="time", title="Time of a round", unit="seconds", queries=queries, lines=lines))
    return charts + ([curve(rows, "eps")] if "eps" in columns(rows) else [])


def as_data(charts: Sequence[Chart]) -> dict[str, dict]:
    """Data for the page's script, by key."""
    return {chart.key: dataclasses.asdict(chart) for chart in charts}
