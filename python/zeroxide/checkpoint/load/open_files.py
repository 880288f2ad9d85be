"""Descriptors of files that are read again and again: kept open, and never more than a few of them."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

__all__ = ["MOST_OPEN", "OpenFiles"]

MOST_OPEN = 16
"""Files of a checkpoint may be as many as ranks that saved it; a process may often have 1,024 descriptors open."""


class OpenFiles:
    """Files that were opened to be read, by path. The one that was used longest ago is closed for another."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """An open descriptor, until another file is asked for or `close` is called. Raises OSError."""
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
            return self._descriptors[path]
        while len(self._descriptors) >= MOST_OPEN:
            os.close(self._descriptors.popitem(last=False)[1])
        found = self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return found

    def close(self) -> None:
        """Closes all of them; each is opened again when it is asked for. Idempotent."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
