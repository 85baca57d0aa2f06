"""Every pipeline of the suite passes every check. `make conformance` prints the table."""

import pytest

from conformance.checks import CASES, CHECKS
from conformance.table import DOCUMENT


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pipeline_is_a_policy(case, check):
    check(case)


def test_the_documented_table_is_that_of_the_suite():
    """Stale, if this fails: run `make conformance`."""
    text = DOCUMENT.read_text()
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["pipeline", *CHECKS]
    assert [row.strip("|").split("|")[0].strip() for row in rows] == [case.name for case in CASES]
    assert all((check.__doc__ or "").strip() in text for check in CHECKS.values())
