"""Elements of one tensor of a file that go to many places: those that lie close together are read in one call.

A part that ranks had of a tensor lies row by row between the rows of other parts. A call for each row costs more than
reading over a small gap, so gaps are read as well, into memory that nobody looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zeroxide.checkpoint.format.stream import SCATTER_PLACES

__all__ = ["GAP_BYTES", "ScatteredRead"]

GAP_BYTES = 16 << 10
"""The largest gap that is read over: copying so much takes about as long as a call does."""

_GAP = memoryview(bytearray(GAP_BYTES))


class ScatteredRead:
    """Collects reads of one tensor until one is not close behind the last, or `flush` is called.

    read: reads bytes of the file from a position into places, one after the other.
    """

    def __init__(self, read: Callable[[Sequence[memoryview], int], None]) -> None:
        self._read = read
        self._places: list[memoryview] = []
        self._begin = 0
        self._end = 0

    def add(self, start: int, into: memoryview) -> None:
        """Fills `into` from byte `start` of the file, at the latest when `flush` is called."""
        gap = start - self._end
        # A gap is one place more.
        if self._places and (not 0 <= gap <= GAP_BYTES or len(self._places) + 2 > SCATTER_PLACES):
            self.flush()
        if not self._places:
            self._begin = start
        elif gap:
            self._places.append(_GAP[:gap])
        self._places.append(into)
        self._end = start + into.nbytes

    def flush(self) -> None:
        """Reads what is left to read."""
        places, self._places = self._places, []
        if places:
            self._read(places, self._begin)
