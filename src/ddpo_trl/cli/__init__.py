"""
The command line, `ddpo-trl`: one module per command, imported when the command runs.

Nothing heavy is imported here, so that `ddpo-trl --help` and a mistyped command answer at once.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from ddpo_trl.cli.errors import UsageError, one_line, wants_debug
from ddpo_trl.suggestions import did_you_mean


# The module of a command has its name, and a function `main(argv) -> exit status`.
COMMANDS = {
    "train": "fine-tune a pipeline on a reward",
    "demo": "train the embedded pipeline in a few minutes, on CPU",
    "sample": "lay images before and after training side by side",
    "report": "write the report of a run, one HTML file",
    "doctor": "tell whether a pipeline can be a policy",
    "serve-reward": "serve a reward function to RemoteReward",
    "env": "print versions and hardware, for a bug report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command. A mistake is answered by one line on stderr; `--debug` shows the traceback.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments, those of the process by default.

    Returns:
        `int`: Exit status: 0; 1 if the run failed or the doctor says no; 130 if it was interrupted.

    Raises:
        `SystemExit`: With status 2 for wrong usage, 0 after `--help`.
    """
    command, rest = _command(list(sys.argv[1:] if argv is None else argv))
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        print(f"ddpo-trl {command}: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        if wants_debug(rest):
            raise error.__cause__ or error from None
        print(f"ddpo-trl {command}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except Exception as error:
        if wants_debug(rest):
            raise
        print(f"ddpo-trl {command}: error: {one_line(error)} (--debug shows the traceback)", file=sys.stderr)
        return 1


def _run(command: str, argv: Sequence[str]) -> int:
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_no_chatter)
    status: int = import_module(f"{__name__}.{command.replace('-', '_')}").main(argv)
    return status


def _is_no_chatter(record: logging.LogRecord) -> bool:
    """False for warnings that image processors can do without torchvision, which nothing here needs."""
    return "requires torchvision" not in record.getMessage()


def _command(argv: list[str]) -> tuple[str, list[str]]:
    """The command and its arguments. `--debug` may stand before the command."""
    if argv[:1] == ["--debug"]:
        argv = [*argv[1:], "--debug"]
    if argv and argv[0] in COMMANDS:
        return argv[0], argv[1:]
    parser = argparse.ArgumentParser(
        prog="ddpo-trl",
        usage="ddpo-trl COMMAND ... [--debug]",
        description="Fine-tune diffusion models with DDPO. ddpo-trl COMMAND --help tells more.",
        epilog="commands:\n" + "\n".join(f"  {name:<16}{description}" for name, description in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="show this")
    parser.add_argument("--version", action="version", version=version("ddpo-trl"), help="show the version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if argv and not argv[0].startswith("-"):
        parser.exit(2, f"ddpo-trl: error: there is no command {argv[0]!r}.{did_you_mean(argv[0], COMMANDS)}\n")
    parser.parse_args(argv)
    parser.exit(2, parser.format_help())
