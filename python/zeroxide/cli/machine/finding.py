"""One line of what `zeroxide doctor` says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "State", "broken", "fine", "lost"]

State = Literal["ok", "lost", "broken"]


@dataclass(frozen=True)
class Finding:
    """What was looked at and what there is; `lost` works with less than it could, `broken` does not work.

    `how` says what to do, where there is something. `data` has the numbers.
    """

    what: str
    state: State
    found: str
    how: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def fine(what: str, found: str, **data: Any) -> Finding:
    """All as it should be."""
    return Finding(what, "ok", found, data=data)


def lost(what: str, found: str, how: str, **data: Any) -> Finding:
    """It works, with less than there could be."""
    return Finding(what, "lost", found, how, data)


def broken(what: str, found: str, how: str, **data: Any) -> Finding:
    """It does not work."""
    return Finding(what, "broken", found, how, data)
