"""
The command line, `ddpo-trl`: one module per command, imported when the command runs.

Nothing heavy is imported here, so that `ddpo-trl --help` and a mistyped command are answered at once.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from ddpo_trl.cli.errors import UsageError, one_line, without_debug
from ddpo_trl.suggestions import did_you_mean


# The module of a command has its name, and a function `main(argv) -> exit status`.
COMMANDS = {
    "train": "fine-tune a pipeline on a reward",
    "demo": "train the embedded pipeline in a few minutes, on CPU",
    "sample": "compare images before and after training side by side",
    "report": "write the report of a run, one HTML file",
    "doctor": "check whether a pipeline can be trained",
    "serve-reward": "serve a reward function to RemoteReward",
    "env": "print versions and hardware, for a bug report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command. An error is reported in one line on stderr; `--debug` shows the traceback.

    Returns:
        `int`: Exit status: 0; 1 if the run failed or the doctor found a problem; 130 if it was interrupted.

    Raises:
        `SystemExit`: With status 2 for invalid usage, 0 after `--help`.
    """
    command, rest = _command(list(sys.argv[1:] if argv is None else argv))
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        print(f"ddpo-trl {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        invalid = isinstance(error, UsageError)
        if without_debug(rest) != rest:
            if invalid and error.__cause__ is not None:
                raise error.__cause__ from None
            raise
        hint = "" if invalid else " (--debug shows the traceback)"
        print(f"ddpo-trl {command}: error: {one_line(error)}{hint}", file=sys.stderr)
        if invalid:
            raise SystemExit(2) from error
        return 1


def _run(command: str, argv: Sequence[str]) -> int:
    # Image processors can do without torchvision, and nothing here needs it.
    log = logging.getLogger("transformers.utils.import_utils")
    log.addFilter(lambda record: "requires torchvision" not in record.getMessage())
    status: int = import_module(f"{__name__}.{command.replace('-', '_')}").main(argv)
    return status


def _command(argv: list[str]) -> tuple[str, list[str]]:
    """Return the command and its arguments; `--debug` may precede the command."""
    if argv[:1] == ["--debug"]:
        argv = [*argv[1:], "--debug"]
    if argv and argv[0] in COMMANDS:
        return argv[0], argv[1:]
    parser = argparse.ArgumentParser(
        prog="ddpo-trl",
        usage="ddpo-trl COMMAND ... [--debug]",
        description="Fine-tune diffusion models with DDPO. `ddpo-trl COMMAND --help` describes a command.",
        epilog="commands:\n" + "\n".join(f"  {name:<16}{description}" for name, description in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("ddpo-trl"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if argv and not argv[0].startswith("-"):
        parser.exit(2, f"ddpo-trl: error: unknown command {argv[0]!r}.{did_you_mean(argv[0], COMMANDS)}\n")
    parser.parse_args(argv)
    parser.exit(2, parser.format_help())
