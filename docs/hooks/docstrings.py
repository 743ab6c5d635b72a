"""Docstrings of the house become Markdown: lists for arguments, links for names, the help of a field as its text."""

import dataclasses
import importlib
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import griffe

REFERENCE = Path(__file__).parents[1] / "reference"
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$")
_ENTRY = re.compile(r"^(`?[\w.*]+`?(?:, `?[\w.*]+`?)*)( \(.*?\))?: ", flags=re.DOTALL)
_NAME = re.compile(r"\[`(?:~[\w.]+\.)?([\w.]+)`\](?![\[(])")


@cache
def documented() -> dict[str, str]:
    """The short name of all that the reference has, and the long one."""
    pages = (path.read_text(encoding="utf-8") for path in sorted(REFERENCE.glob("*.md")))
    return {name.rpartition(".")[2]: name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}


def linked(text: str) -> str:
    """Makes "[`Basis.lift`]" a link, or leaves the name where the reference does not have it."""

    def link(found: re.Match[str]) -> str:
        head, dot, rest = found[1].partition(".")
        known = documented().get(head)
        return f"[`{found[1]}`][{known}{dot}{rest}]" if known else f"`{found[1]}`"

    return _NAME.sub(link, text)


def _entries(block: str) -> str:
    """A block of "name (type): text" as a Markdown list; one of plain text as it is."""
    entries: list[str] = []
    for line in block.splitlines():
        if entries and (line.startswith(" ") or not line):
            entries[-1] += f"\n{line.strip()}"
        else:
            entries.append(line)
    if not all(_ENTRY.match(entry) for entry in entries):
        return block
    made = []
    for entry in entries:
        found = _ENTRY.match(entry)
        assert found is not None
        names = ", ".join(f"**`{name.strip('`')}`**" for name in found[1].split(", "))
        made.append(f"- {names}{found[2] or ''}: " + " ".join(entry[found.end() :].split("\n")))
    return "\n".join(made)


def to_markdown(text: str) -> str:
    """Turns the sections of a docstring into Markdown.

    >>> print(to_markdown("Adds.\\n\\nArgs:\\n    a (`int`): The first,\\n        an integer.\\n    b: The second."))
    Adds.
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - **`a`** (`int`): The first, an integer.
    - **`b`**: The second.
    """
    parts: list[str] = []
    lines = text.splitlines()
    while lines:
        line = lines.pop(0)
        if not (found := _SECTION.match(line)):
            parts.append(line)
            continue
        block = []
        if found[1] != "Example":
            while lines and (lines[0].startswith("    ") or not lines[0]):
                block.append(lines.pop(0))
        body = textwrap.dedent("\n".join(block)).strip("\n")
        parts += [f"**{found[1]}**", "", *([_entries(body), ""] if body else [])]
    return linked("\n".join(parts).rstrip())


def field_of(attribute: griffe.Attribute) -> dataclasses.Field[Any] | None:
    """The dataclass' field behind an attribute that is written as `field(...)`, as Python has it."""
    owner = attribute.parent
    if not (isinstance(owner, griffe.Class) and str(attribute.value).startswith("field(")):
        return None
    made = getattr(importlib.import_module(owner.module.path), owner.name)
    return next(field for field in dataclasses.fields(made) if field.name == attribute.name)


class Docstrings(griffe.Extension):
    """What mkdocstrings runs on every object that it has read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if (field := field_of(attr)) is None:
            return
        if attr.docstring is None and (text := field.metadata.get("help")):
            attr.docstring = griffe.Docstring(text, parent=attr)
        attr.value = None if field.default is dataclasses.MISSING else repr(field.default)
