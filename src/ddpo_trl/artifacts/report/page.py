"""The page of the report."""

import base64
import hashlib
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ddpo_trl.artifacts.report import charts
from ddpo_trl.artifacts.report.numbers import duration, finite, number, percent, short
from ddpo_trl.artifacts.report.reading import Run, read_run
from ddpo_trl.artifacts.report.settings import compare


REPORT_NAME = "report.html"
METHODS = {"is": "Importance sampling", "sf": "Score function"}


def write_report(run_directory: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """
    Write a page with the curves, samples, settings, environment and time split of a run.

    It reads `metrics.csv`, `samples/round-*/samples.json` with the images next to it, `ddpo_config.json` and
    `environment.json` in the folder of the run. Any of them may be missing; the page lists those that are. The page is
    one file of a few MB that loads nothing else. It contains copies of the images of at most 24 rounds, evenly spaced,
    with at most 512 pixels on the longest side, fewer if there are many images.

    Args:
        run_directory (`str` or `os.PathLike`):
            `output_dir` of a run, finished or not.
        path (`str` or `os.PathLike`, *optional*):
            Path of the page, `report.html` in `run_directory` by default.

    Returns:
        `Path`: Path of the page.

    Raises:
        `ValueError`: If the folder is not that of a run, or its `metrics.csv` was not written by one.
    """
    directory = Path(run_directory)
    page = render(read_run(directory))
    target = directory / REPORT_NAME if path is None else Path(path)
    target.write_text(page, encoding="utf-8")
    return target


def render(run: Run) -> str:
    """Return the page. All text from the run is escaped."""
    scripts = [f"/*\n{asset('uPlot.LICENSE')}\n*/\n{asset('uPlot.min.js')}", asset("report.js")]
    return template().render(
        **contents(run),
        styles=[Markup(asset("uPlot.min.css")), Markup(asset("report.css"))],
        scripts=[Markup(script) for script in scripts],
        script_hashes=Markup(" ".join(script_hash(script) for script in scripts)),
    )


@cache
def template() -> Template:
    """Return the page without a run."""
    environment = Environment(
        loader=PackageLoader("ddpo_trl", "assets/report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {function.__name__: function for function in (number, short, percent, duration)}
    return environment.get_template("report.html.jinja")


def asset(name: str) -> str:
    """Return a file of the page's styles and scripts."""
    return (files("ddpo_trl") / "assets" / "report" / name).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """Return the hash by which the content security policy allows the page's own scripts and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def contents(run: Run) -> dict[str, Any]:
    """Return the variables of the template."""
    rows = run.rows
    policy_charts = charts.policy_charts(rows)
    sections = {
        "reward_charts": charts.reward_charts(rows),
        "policy_charts": [chart for chart in policy_charts if chart.constant is None],
        "evaluation_charts": charts.evaluation_charts(rows),
        "time_charts": charts.time_charts(rows),
    }
    return {
        **sections,
        "curves": charts.as_data([chart for section in sections.values() for chart in section]),
        "constants": {chart.title: chart.constant for chart in policy_charts if chart.constant is not None},
        "run": run,
        "subtitle": subtitle(run),
        "figures": figures(run),
        "phases": charts.time_phases(rows),
        "scoring_seconds": charts.seconds(rows, "time/scoring"),
        "settings": compare(run.settings or {}),
    }


def subtitle(run: Run) -> str:
    """Return the method and the rewards, as far as they are known."""
    names = charts.function_names(run.rows).values()
    method = METHODS.get((run.settings or {}).get("loss_type", ""), "")
    return " · ".join(filter(None, [method, f"rewarded for {', '.join(names)}" if names else ""]))


def figures(run: Run) -> list[dict[str, str]]:
    """Return the figures at the top."""
    shown = []
    rewards = [reward for row in run.rows if (reward := finite(row.get("reward"))) is not None]
    if len(rewards) > 1:
        change = f"{short(rewards[0])} → {short(rewards[-1])}"
        shown.append({"label": "Reward", "value": change, "note": "first and last round"})
    fixed = [one for one in run.rounds if one.fixed_reward is not None]
    if len(fixed) > 1:
        change = f"{short(fixed[0].fixed_reward)} → {short(fixed[-1].fixed_reward)}"
        note = f"{fixed[0].title.lower()} and in round {fixed[-1].index}"
        shown.append({"label": "Same prompts and seeds", "value": change, "note": note})
    if run.rows:
        note = f"in {len(run.rows)} {'round' if len(run.rows) == 1 else 'rounds'}"
        shown.append({"label": "Reward queries", "value": number(run.rows[-1]["episode"]), "note": note})
    if phases := charts.time_phases(run.rows):
        total = duration(sum(phase.seconds for phase in phases))
        shown.append({"label": "Time", "value": total, "note": "sampling, rewards and training"})
    return shown
