"""Who asks: the few answers that depend on which function of another library wants them."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import FrameType

__all__ = ["called_by"]


def called_by(package: str, names: Collection[str]) -> bool:
    """Whether a function of that package, with one of the names, is among the callers."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name in names and module.partition(".")[0] == package:
            return True
        frame = frame.f_back
    return False
