"""`make conformance`: runs every check on every pipeline, writes the table to docs/conformance.md, prints it."""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
from rich.console import Console
from rich.table import Table


sys.path.insert(0, str(Path(__file__).parents[1]))  # tests import each other from there

from conformance.checks import CASES, CHECKS, NOT_APPLICABLE
from conformance.image_pipelines import Case


DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"

INTRODUCTION = """\
# Conformance

Written by `make conformance`, with diffusers {version}. Every pipeline is built tiny and random, of diffusers' own
classes, and gets real prompts through real text encoders; `make test` runs the same checks.

{legend}
"""

Results = dict[str, dict[str, tuple[str, str]]]  # by pipeline and check: "yes", "no" or "-", and a remark


def main() -> int:
    """Runs the suite; the exit status is 0 if all passed."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    results = {case.name: {title: outcome(check, case) for title, check in CHECKS.items()} for case in CASES}
    DOCUMENT.write_text(markdown(results))
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
    answers = [answer for row in results.values() for answer, _ in row.values()]
    passed, total = answers.count("yes"), len(answers) - answers.count("-")
    console.print(f"{passed}/{total}")
    return int(passed < total)


def outcome(check: Callable[[Case], str | None], case: Case) -> tuple[str, str]:
    """Whether a pipeline passes a check, and a remark."""
    try:
        remark = check(case) or ""
    except Exception as error:  # a pipeline may fail in any way, and the table goes on
        return "no", f"{type(error).__name__}: {error}"
    return "-" if remark.startswith(NOT_APPLICABLE) else "yes", remark


def remarks(results: Results) -> list[str]:
    return [
        f"- {name}, {title}: {remark}."
        for name, row in results.items()
        for title, (_, remark) in row.items()
        if remark
    ]


def markdown(results: Results) -> str:
    """The table as a documentation page."""
    legend = "\n".join(f"- **{title}**: {(check.__doc__ or '').strip()}" for title, check in CHECKS.items())
    lines = [
        INTRODUCTION.format(version=diffusers.__version__, legend=legend),
        f"| pipeline | {' | '.join(CHECKS)} |",
        f"|---|{'---|' * len(CHECKS)}",
        *(f"| {name} | {' | '.join(answer for answer, _ in row.values())} |" for name, row in results.items()),
        "",
        *remarks(results),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
