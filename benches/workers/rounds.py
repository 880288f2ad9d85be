"""The worker's half of a benchmark whose contestants take turns: see Contestant in ../side_by_side.py."""

from __future__ import annotations

import sys
from collections.abc import Callable

import process


def serve(about: dict[str, object], measure: Callable[[], dict[str, object]]) -> None:
    """Announces `about`, then answers every line of input with the result of one `measure()`, until input ends."""
    process.emit(about)
    for _ in sys.stdin:
        process.emit(measure())
