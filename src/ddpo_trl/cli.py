"""The command line, `ddpo-trl`."""

import argparse
import sys
from collections.abc import Sequence

from ddpo_trl import demo


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments, those of the process by default.

    Returns:
        `int`: Exit status.
    """
    parser = argparse.ArgumentParser(prog="ddpo-trl", description="Fine-tune diffusion models with DDPO.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("demo", add_help=False, help="train the embedded pipeline in a few minutes, on CPU")
    _, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    demo.main(rest)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
