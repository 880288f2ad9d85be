"""Tables of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zeroxide.cli.page.markup import Markup, element, join

__all__ = ["details", "pairs", "table"]


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table whose first column names the row. It scrolls by itself where the page is narrow."""
    titles = element("tr", *(element("th", each, scope="col") for each in head))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    made = element("table", element("caption", caption), element("thead", titles), element("tbody", join(body, "\n")))
    return element("div", made, class_="scroll", tabindex=0, role="region", aria_label=caption)


def pairs(rows: Iterable[tuple[str, str | Markup]]) -> Markup:
    """Names with what they are; rows with nothing to say are left out."""
    return element("dl", *(join([element("dt", name), element("dd", text)]) for name, text in rows if text))


def details(summary: str, *inside: str) -> Markup:
    """What is shown when it is asked for."""
    return element("details", element("summary", summary), *inside)
