"""`ddpo-trl env`."""

from collections.abc import Sequence

from ddpo_trl.artifacts.environment import environment
from ddpo_trl.cli.arguments import CommandParser


def main(argv: Sequence[str]) -> int:
    """Print a list for bug reports."""
    CommandParser([], "ddpo-trl env", "Print versions and hardware, for a bug report.").parse(argv)
    for name, value in environment().items():
        print(f"- {name}: {value}")
    return 0
