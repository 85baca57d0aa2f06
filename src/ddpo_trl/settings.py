"""Fields of settings: each has its text, its bounds and its choices in one place."""

import dataclasses
import functools
import json
import math
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar


T = TypeVar("T")

# Kinds of numbers by the type of a field, with their names.
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
        at_least, above, at_most (`float`, *optional*), finite (`bool`, *optional*, defaults to `False`):
            Conditions that the number meets.
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


def setting(default: Any, help: str) -> Any:
    """
    A field of a dataclass.

    Args:
        default (`Any`):
            Value if it is not given. A list is copied for each instance.
        help (`str`):
            Text of the docstring and of `--help`, which shows the first sentence.
    """
    metadata = {"help": " ".join(help.split())}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field) -> Any:
    """Return the value of a field that is not given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache  # resolving names takes longer than all checks of a config
def types_of(settings: type, with_bounds: bool) -> dict[str, Any]:
    """Return the types of the fields by name."""
    return typing.get_type_hints(settings, include_extras=with_bounds)


def wrong_types(settings: Any) -> Iterator[str]:
    """Return sentences about the fields for numbers whose value is not a number, such as a text."""
    for name, hint in types_of(settings.__class__, with_bounds=False).items():
        kind, what = NUMBERS.get(hint, (object, ""))
        value = vars(settings).get(name)
        if not isinstance(value, kind | None) or (what and isinstance(value, bool)):
            yaml = " (In YAML, 1e-4 is a text and 1.0e-4 a number.)" if isinstance(value, str) else ""
            yield f"{name} is {value!r}; give {what}.{yaml}"


def out_of_bounds(settings: Any) -> Iterator[str]:
    """Return sentences about the fields whose value is not among the choices or within the bounds of their type."""
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
    Class decorator that appends the texts of the fields to the docstring of a dataclass.

    Args:
        headings (`str`):
            Headings, by the name of the field they stand above.
    """

    def document(settings: type[T]) -> type[T]:
        intro = (settings.__doc__ or "").rstrip()
        settings.__doc__ = "\n".join([intro, "", "    Parameters:", *parameters(settings, headings), "    "])
        return settings

    return document


def parameters(settings: Any, headings: typing.Mapping[str, str]) -> Iterator[str]:
    """Lines of a docstring's section of parameters, in TRL's format."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    hints = types_of(settings, with_bounds=False)
    for name in settings.__annotations__:
        if name in headings:
            yield from ["", f"        > {headings[name]}", ""][name == next(iter(headings)) :]
        default = default_of(fields[name])
        shown = json.dumps(default) if isinstance(default, str | list) else str(default)
        kind = f"{type_name(hints[name])}, *optional*" + ("" if default is None else f", defaults to `{shown}`")
        yield f"        {name} ({kind}):"
        yield textwrap.fill(
            fields[name].metadata["help"],
            119,
            initial_indent=" " * 12,
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )


def type_name(annotation: Any) -> str:
    """A type as docstrings write it, without `None`."""
    kinds = [kind for kind in typing.get_args(annotation) or [annotation] if kind is not type(None)]
    if typing.get_origin(annotation) is Literal:
        names = [f'`"{kind}"`' for kind in kinds]
    elif typing.get_origin(annotation) is list:
        names = [f"`{annotation}`"]
    else:
        names = [f"`{kind if typing.get_args(kind) else kind.__name__}`" for kind in kinds]
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
