"""Errors as one line."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


# Values of `--debug` that belong to `TrainingArguments.debug`.
DEBUG_OPTIONS = ("underflow_overflow", "tpu_metrics_debug")


class UsageError(Exception):
    """Invalid usage of a command. Its cause, if there is one, is the original error."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the errors of code that checks arguments into a [`UsageError`]."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """Return an error's message and those of its causes without line breaks; a table below a sentence is left out."""
    first = str(error).strip().partition("\n")[0]
    message = first if first.endswith(".") else textwrap.shorten(str(error), 1000) or type(error).__name__
    cause = error.__cause__
    if isinstance(error, UsageError) or cause is None or str(cause) in message:
        return message
    return f"{message} {type(cause).__name__}: {one_line(cause)}"


def without_debug(argv: Sequence[str]) -> list[str]:
    """Return a command line without the `--debug` for tracebacks. `TrainingArguments.debug` has a value and stays."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    return [word for word, following in pairs if word != "--debug" or following in DEBUG_OPTIONS]
