"""Fields of settings, each with its text, bounds and choices in one place."""

import dataclasses
import functools
import inspect
import json
import math
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar


T = TypeVar("T")

# Default of a setting that must be given.
REQUIRED = dataclasses.MISSING

# Kinds of numbers by the type of a field, and their names.
NUMBERS: dict[Any, tuple[type, str]] = {
    int: (Integral, "an integer"),
    int | None: (Integral, "an integer"),
    float: (Real, "a number"),
    float | None: (Real, "a number"),
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """
    Range of a number. NaN is in none.

    Args:
        at_least, above, at_most (`float`, *optional*):
            Limits.
        finite (`bool`, *optional*, defaults to `False`):
            Whether infinity is excluded.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    finite: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (not self.finite or math.isfinite(value))
        )

    def __str__(self) -> str:
        given = {name.replace("_", " "): bound for name, bound in vars(self).items() if bound is not None}
        finite = given.pop("finite")
        return ", ".join([f"{name} {bound}" for name, bound in given.items()] + ["finite"] * finite)


Count = Annotated[int, Bounds(at_least=1)]
OptionalCount = Annotated[int | None, Bounds(at_least=1)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(at_least=0, finite=True)]


def setting(default: Any, help: str, **options: Any) -> Any:
    """
    Field of a dataclass, whose one text is shown by the docstring, by `--help` and in the documentation.

    Args:
        default (`Any`):
            Default value, or [`REQUIRED`]. A list is copied for each instance.
        help (`str`):
            Description.
        options (`Any`):
            Further arguments of `argparse.ArgumentParser.add_argument`, such as `action`, and `aliases` of the flag.
    """
    metadata = {"help": " ".join(help.split()), **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default value of a field, or [`REQUIRED`]."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache  # resolving names takes longer than all checks of a config
def types_of(settings: type, with_bounds: bool) -> dict[str, Any]:
    """Return the types of the fields by name."""
    return typing.get_type_hints(settings, include_extras=with_bounds)


def wrong_types(settings: Any) -> Iterator[str]:
    """Yield a sentence for each numeric field whose value is not a number."""
    for name, hint in types_of(settings.__class__, with_bounds=False).items():
        kind, what = NUMBERS.get(hint, (object, ""))
        value = vars(settings).get(name)
        if not isinstance(value, kind | None) or (what and isinstance(value, bool)):
            yaml = " (In YAML, 1e-4 is a text and 1.0e-4 a number.)" if isinstance(value, str) else ""
            yield f"{name} is {value!r}; give {what}.{yaml}"


def out_of_bounds(settings: Any) -> Iterator[str]:
    """Yield a sentence for each field whose value is not among the choices or within the bounds of its type."""
    for name, hint in types_of(settings.__class__, with_bounds=True).items():
        value = vars(settings).get(name)
        if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            yield f"{name} is {value!r}; choose one of {', '.join(map(repr, typing.get_args(hint)))}."
        if typing.get_origin(hint) is Annotated:
            kind, bounds = typing.get_args(hint)
            optional = type(None) in typing.get_args(kind)
            if not (optional and value is None) and value not in bounds:
                yield f"{name} is {value}; it must be {bounds}{' or None' if optional else ''}."


def documented(**headings: str) -> Callable[[type[T]], type[T]]:
    """
    Class decorator that appends the texts of the fields to the docstring of a dataclass, in TRL's format.

    Args:
        headings (`str`):
            Headings, by the name of the field below them.
    """

    def document(settings: Any) -> Any:
        fields = {field.name: field for field in dataclasses.fields(settings)}
        parameters: list[str] = []
        for name in settings.__annotations__:  # without those of base classes
            if name in headings:
                parameters += ["", f"        > {headings[name]}", ""]
            parameters += _entry(fields[name], types_of(settings, with_bounds=False)[name])
        listed = "\n".join(parameters).removeprefix("\n")
        settings.__doc__ = f"{(settings.__doc__ or '').rstrip()}\n\n    Parameters:\n{listed}\n    "
        return settings

    return document


def _entry(field: dataclasses.Field, hint: Any) -> list[str]:
    default = default_of(field)
    kind = f"`{inspect.formatannotation(hint).removesuffix(' | None')}`"
    if default is not REQUIRED:
        kind += ", *optional*"
    if default is not REQUIRED and default is not None:
        kind += f", defaults to `{json.dumps(default) if isinstance(default, str | list) else default}`"
    lines = textwrap.wrap(field.metadata["help"], 107, break_long_words=False, break_on_hyphens=False)
    return [f"        {field.name} ({kind}):", *(f"            {line}" for line in lines)]
