"""An extension of griffe, which reads the package for this site: lines that describe arguments become a list.

A docstring has them as `name: what it is`, with what follows indented; as Markdown they would be one paragraph.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Object

ITEM = re.compile(r"^(\*{0,2}\w+(?:, \w+)*): (.*)$")


class Arguments(Extension):
    """Changes docstrings of functions and classes as they are read."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        """A function's arguments are its own."""
        self._list(func, {each.name for each in func.parameters})

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """A class is described with the arguments of its constructor."""
        made = cls.members.get("__init__")
        if isinstance(made, Function):
            self._list(cls, {each.name for each in made.parameters})

    def _list(self, found: Object, names: set[str]) -> None:
        if found.docstring is not None:
            found.docstring.value = listed(found.docstring.value, names)


def listed(text: str, names: set[str]) -> str:
    """The docstring with a list item for each line that begins with some of `names` and a colon."""
    lines: list[str] = []
    for line in text.splitlines():
        item = ITEM.match(line)
        if item and {each.strip("* ") for each in item[1].split(",")} <= names:
            if lines and lines[-1].strip() and not lines[-1].startswith(("- ", "  ")):
                lines.append("")
            line = f"- `{item[1]}`: {item[2]}"
        lines.append(line)
    return "\n".join(lines)
