"""Every pipeline of the suite passes every check. `make conformance` prints the table."""

from collections.abc import Iterator
from typing import Any

import pytest

from conformance.checks import CASES, CHECKS
from conformance.more_pipelines import MORE_CASES
from conformance.table import DOCUMENT


# The pipelines of the second half differ in how they treat scheduler and state: the rest of their rows is `slow`.
OF_SCHEDULER_AND_STATE = ("replay = sampling", "own sampler", "one pass")


def cells() -> Iterator[Any]:
    for case in CASES:
        for title, check in CHECKS.items():
            is_slow = case in MORE_CASES and title not in OF_SCHEDULER_AND_STATE
            yield pytest.param(case, check, id=f"{case.name}-{title}", marks=[pytest.mark.slow] * is_slow)


@pytest.mark.parametrize(("case", "check"), cells())
def test_a_pipeline_is_a_policy(case, check):
    check(case)


def test_the_documented_table_is_that_of_the_suite():
    """Stale, if this fails: run `make conformance`."""
    text = DOCUMENT.read_text()
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["pipeline", *CHECKS]
    assert [row.strip("|").split("|")[0].strip() for row in rows] == [case.name for case in CASES]
    assert all((check.__doc__ or "").strip() in text for check in CHECKS.values())
