"""Errors as one line, with a suggestion."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


# `TrainingArguments` has a field `debug`, whose flag takes one of these.
DEBUG_OPTIONS = ("underflow_overflow", "tpu_metrics_debug")


class UsageError(Exception):
    """The command was called with something wrong. Its cause, if there is one, is the error that told so."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """
    For what makes things from arguments: the errors with which it refuses them become a [`UsageError`].

    Example:

    ```python
    from ddpo_trl.cli.errors import UsageError, usage_errors

    try:
        with usage_errors():
            int("ten")
    except UsageError as error:
        assert "ten" in str(error)
    ```
    """
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """An error's message and those of its causes, without line breaks. A table below a sentence is left out."""
    first = str(error).strip().partition("\n")[0]
    message = first if first.endswith(".") else textwrap.shorten(str(error), 1000) or type(error).__name__
    cause = error.__cause__
    if isinstance(error, UsageError) or cause is None or str(cause) in message:
        return message
    return f"{message} {type(cause).__name__}: {one_line(cause)}"


def debug_position(argv: Sequence[str]) -> int | None:
    """Where `--debug` stands that asks for tracebacks, and is not the flag of `TrainingArguments`."""
    for position, word in enumerate(argv):
        if word == "--debug" and (*argv, "")[position + 1] not in DEBUG_OPTIONS:
            return position
    return None


def wants_debug(argv: Sequence[str]) -> bool:
    """Return whether a command line asks for tracebacks."""
    return debug_position(argv) is not None
