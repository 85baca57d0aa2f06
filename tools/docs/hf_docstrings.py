"""Hugging Face docstrings as Markdown: mkdocstrings itself knows the formats of Google, NumPy and Sphinx only."""

import inspect
import pydoc
import re
import textwrap
from typing import Any

from griffe import Extension, GriffeLoader, NameResolutionError, Object


SECTIONS = {
    "Args": "Arguments",
    "Parameters": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
    "Example": "Example",
}
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):\n((?:\n|[ ]{{4}}.*\n?)+)", flags=re.MULTILINE)

# name (`type`, *optional*, defaults to `x`):     or     `ValueError`: If ...
ENTRY = re.compile(r"^(?P<names>[\w*`][\w*`.,\[\]~ ]*?)(?: \((?P<type>.+)\))?:(?: (?P<text>.+))?$")

# [`~package.module.name`], if it is not a Markdown link already
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")


class HuggingFaceDocstrings(Extension):
    """Rewrites every docstring that is loaded."""

    def on_object(self, *, obj: Object, loader: GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        value = obj.docstring.value
        if obj.is_class and obj.path.startswith("ddpo_trl."):  # settings append the texts of their fields
            value = pydoc.locate(obj.path).__doc__ or value
        obj.docstring.value = to_markdown(value, obj)


def to_markdown(docstring: str, scope: Object) -> str:
    """
    A docstring with sections as lists and references as links.

    Args:
        docstring (`str`):
            In the Hugging Face format.
        scope (`griffe.Object`):
            Where it stands: names are looked up from there.
    """
    text = SECTION.sub(section_to_markdown, inspect.cleandoc(docstring) + "\n")
    return REFERENCE.sub(lambda match: link(match[2], bool(match[1]), scope), text)


def section_to_markdown(match: re.Match[str]) -> str:
    """A heading, and below it the section's text, or its entries as a list."""
    title, body = SECTIONS[match[1]], textwrap.dedent(match[2]).strip()
    if title not in ("Returns", "Example"):
        body = "\n".join(entry_to_markdown(line) for line in body.splitlines())
    return f"**{title}**\n\n{body}\n\n"


def entry_to_markdown(line: str) -> str:
    """A line of a section: an entry's first line becomes a list item, a group's heading a paragraph."""
    if line.startswith("> "):
        return f"\n{line.removeprefix('> ')}:\n"
    if line.startswith(" ") or (match := ENTRY.match(line)) is None:
        return line
    names = match["names"].replace("`", "")
    kind = f" ({match['type']})" if match["type"] else ""
    return f"- **`{names}`**{kind}: {match['text'] or ''}".rstrip()


def link(name: str, short: bool, scope: Object) -> str:
    """A link to what the name means at `scope`, if that has a place in the documentation; else the name as code."""
    try:
        path = scope.resolve(name)
    except NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'
