"""`make conformance`: runs every check on every pipeline, writes the table to docs/conformance.md and prints it."""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
from rich.console import Console
from rich.table import Table


sys.path.insert(0, str(Path(__file__).parents[1]))  # tests import each other from there

from conformance.checks import CASES, CHECKS, NOT_APPLICABLE, it_is_refused_with_the_cause
from conformance.refused_pipelines import REFUSALS


DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"

INTRODUCTION = """\
# Conformance

Written by `make conformance`, with diffusers {version}. Every pipeline is a tiny one with random weights,
built from the classes of diffusers and transformers, and encodes its prompts with its own text encoders. `make test`
runs a part of the same checks.

{legend}
"""

REFUSED = """\
## Refused

These pipelines can't be policies. **refused**: {legend}

| pipeline | refused | message |
|---|---|---|
"""

Results = dict[str, dict[str, tuple[str, str]]]  # by pipeline and check: "yes", "no" or "-", and a remark


def main() -> int:
    """Run the suite; the exit status is 0 if all checks pass."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    results = {case.name: {title: outcome(check, case) for title, check in CHECKS.items()} for case in CASES}
    refusals = {each.case.name: outcome(it_is_refused_with_the_cause, each) for each in REFUSALS}
    DOCUMENT.write_text(markdown(results, refusals))
    table = Table()
    table.add_column("pipeline", no_wrap=True)
    for title in CHECKS:
        table.add_column(title)
    for name, row in results.items():
        table.add_row(name, *(answer for answer, _ in row.values()))
    console = Console(width=120)
    console.print(table)
    for remark in remarks(results):
        console.print(remark)
    for name, (answer, message) in refusals.items():
        console.print(f"{name}, refused: {answer}. {message}")
    rows = [row.values() for row in results.values()]
    answers = [answer for cells in (*rows, refusals.values()) for answer, _ in cells]
    passed, total = answers.count("yes"), len(answers) - answers.count("-")
    console.print(f"{passed}/{total}")
    return int(passed < total)


def outcome(check: Callable[[Any], str | None], case: Any) -> tuple[str, str]:
    """Run a check on a pipeline, and return its answer ("yes", "no" or "-") and a remark."""
    try:
        remark = check(case) or ""
    except Exception as error:  # whatever the failure, the table continues
        return "no", f"{type(error).__name__}: {error}"
    return "-" if remark.startswith(NOT_APPLICABLE) else "yes", remark


def remarks(results: Results) -> list[str]:
    return [
        f"- {name}, {title}: {remark}."
        for name, row in results.items()
        for title, (_, remark) in row.items()
        if remark
    ]


def markdown(results: Results, refusals: dict[str, tuple[str, str]]) -> str:
    """Format the tables as a documentation page."""
    legend = "\n".join(f"- **{title}**: {(check.__doc__ or '').strip()}" for title, check in CHECKS.items())
    lines = [
        INTRODUCTION.format(version=diffusers.__version__, legend=legend),
        f"| pipeline | {' | '.join(CHECKS)} |",
        f"|---|{'---|' * len(CHECKS)}",
        *(f"| {name} | {' | '.join(answer for answer, _ in row.values())} |" for name, row in results.items()),
        "",
        *remarks(results),
        "",
        REFUSED.format(legend=" ".join((it_is_refused_with_the_cause.__doc__ or "").split()))
        + "\n".join(f"| {name} | {answer} | {message} |" for name, (answer, message) in refusals.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
