"""HTML and SVG as text: whatever comes from a run is escaped, whatever is made here is not escaped twice."""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["Markup", "element", "join"]

_EMPTY = frozenset({"meta", "br"})
"""Elements of HTML that have no end tag."""


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: object) -> Markup:
    """An element. Children that are not `Markup` are escaped. Of attributes, `class_` is "class", `view_box` "viewBox",
    other underscores are hyphens, None is left out, and floats have two decimals at most."""
    words = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        written = "viewBox" if key == "view_box" else key.rstrip("_").replace("_", "-")
        words.append(f'{written}="{html.escape(_short(value), quote=True)}"')
    inside = join(children)
    if name in _EMPTY:
        return Markup(f"<{' '.join(words)}>")
    return Markup(f"<{' '.join(words)}>{inside}</{name}>")


def join(children: Iterable[str], between: str = "") -> Markup:
    """Several pieces as one; those that are not `Markup` are escaped."""
    return Markup(
        between.join(each if isinstance(each, Markup) else html.escape(each, quote=False) for each in children)
    )


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
