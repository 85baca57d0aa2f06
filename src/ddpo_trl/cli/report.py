"""`ddpo-trl report`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ddpo_trl.artifacts.report import write_report
from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.cli.errors import usage_errors


@dataclass
class ReportArguments:
    """
    What `ddpo-trl report` takes beside the folder.

    Args:
        output (`str`, *optional*):
            The file, `report.html` in the folder by default.
    """

    output: str | None = field(
        default=None, metadata={"help": "The file; report.html in the folder if not given.", "aliases": ["-o"]}
    )


def main(argv: Sequence[str]) -> int:
    """Writes the report of a run again."""
    parser = CommandParser(
        [ReportArguments],
        "ddpo-trl report",
        "Write the report of a run: one HTML file that needs no network.",
        example="FOLDER",
    )
    parser.add_argument("folder", metavar="FOLDER", help="The output_dir of the run.")
    arguments, rest = parser.parse(argv)
    with usage_errors():
        path = write_report(rest.folder, arguments.output)
    print(f"Saved {path}")
    return 0
