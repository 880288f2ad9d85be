"""Engines of tests leave the pages of libraries where they are.

An engine drops them from the resident set twice while it is made (`zeroxide.trim_libraries`), and then takes them back
page by page. That is most of what an engine of a small model costs, and changes no number. Programs that tests start
as users would, and ranks that are fresh interpreters, do it all the same, and so does whoever calls `trimming`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zeroxide import _core

_trim: Callable[[], int] = _core.drop_clean_text


def leave_libraries() -> None:
    """From now on engines of this process drop nothing."""
    _core.drop_clean_text = lambda: 0


@contextmanager
def trimming() -> Iterator[list[int]]:
    """Engines made inside drop pages, as they do for users; the bytes of each time."""
    dropped: list[int] = []

    def trim() -> int:
        dropped.append(_trim())
        return dropped[-1]

    left, _core.drop_clean_text = _core.drop_clean_text, trim
    try:
        yield dropped
    finally:
        _core.drop_clean_text = left
