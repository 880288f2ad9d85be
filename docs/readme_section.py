"""A hook of mkdocs: a page shows a section of README where it says `<!-- README: TITLE -->`, so that it stands once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
PLACE = re.compile(r"^<!-- README: (.+) -->$", re.MULTILINE)


def section(title: str) -> str:
    """The section, without its heading, with links as they are from a page in `docs`. Raises LookupError."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README.read_text(), re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"README has no section {title}")
    # What follows the list is of the whole README.
    lines = found[1].strip().split("\n\n")
    return re.sub(r"\]\(docs/", "](", lines[0])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls it with the text of each page."""
    return PLACE.sub(lambda found: section(found[1]), markdown)
