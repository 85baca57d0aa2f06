"""`make real-size`: the tests on a simulated GPU, in processes of their own. The last line is passed/total."""

import os
import sys
from pathlib import Path

import pytest
from device import problem  # type: ignore[import-not-found]  # found next to this file


class Tally:
    """Counts the results of pytest, for the last line."""

    passed = total = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.total += 1
            self.passed += report.passed


def main() -> int:
    if reason := problem():
        print(reason)
        return 1
    os.environ["SIMULATED_GPU"] = "1"
    tally = Tally()
    here = str(Path(__file__).parent)
    status = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", here, *sys.argv[1:]], plugins=[tally])
    print(f"{tally.passed}/{tally.total}")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
