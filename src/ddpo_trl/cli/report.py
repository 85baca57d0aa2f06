"""`ddpo-trl report`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ddpo_trl.artifacts.report import write_report
from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.cli.errors import usage_errors
from ddpo_trl.settings import documented, setting


@documented()
@dataclass
class ReportArguments:
    """
    Arguments of `ddpo-trl report`.
    """

    output: str | None = setting(None, "Output file; `report.html` in the folder by default.", aliases=["-o"])


def main(argv: Sequence[str]) -> int:
    """Write the report of a run again."""
    description = "Write the report of a run: one HTML file that needs no network."
    parser = CommandParser([ReportArguments], "ddpo-trl report", description, example="FOLDER")
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of the run.")
    (arguments, rest), _ = parser.parse(argv)
    with usage_errors():
        path = write_report(rest.folder, arguments.output)
    print(f"Saved {path}")
    return 0
