"""Host memory that tensors of a device wait in: taken from the system in slabs, given out in grains, kept for reuse.

How much is needed is known when a forward has run once. So the pool grows, as far as it is told that there is room, and
every later forward finds what the first one took. The device copies to and from it in place where it can be locked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zeroxide.device.placement import fresh_pages

__all__ = ["GRAIN", "HostPool", "Lent"]

GRAIN = 1 << 20
"""Bytes that memory is given out in."""
SLAB = 64 << 20
"""Bytes that it is taken in from the system, where there is room for as many and no more are needed at once."""


@dataclass(frozen=True, slots=True)
class Lent:
    """What holds one tensor's bytes, in their order."""

    pieces: list[torch.Tensor]
    """Each flat bytes."""
    ranges: list[tuple[int, int, int]]
    """(slab, first grain, grains) of each piece."""


class HostPool:
    """The memory of one engine.

    lock: lets the device use memory in place, or says why it cannot and returns False; it is asked no more then.
    room: how many bytes the pool may take beyond those that it has.
    """

    def __init__(self, lock: Callable[[torch.Tensor], bool], room: Callable[[int], int | None]) -> None:
        self._lock = lock
        self._room = room
        self._slabs: list[torch.Tensor] = []
        self._locks = True
        """Whether all of them could be locked."""
        self._free: list[tuple[int, int, int]] = []
        """(slab, first grain, grains) in that order; no two touch."""
        self.nbytes = 0
        """Bytes taken from the system."""
        self.used = 0
        """Bytes lent, in whole grains."""
        self.peak = 0
        """The most that were lent at once."""

    def take(self, nbytes: int) -> Lent | None:
        """Memory for `nbytes`, above 0, in as few pieces as a look from the front finds; None where there is no room
        for it."""
        missing = -(-nbytes // GRAIN)
        if missing > sum(count for *_, count in self._free) and not self._grow(missing):
            return None
        fitting = [each for each in self._free if each[2] >= missing]
        ranges = []
        for slab, first, count in fitting[:1] or list(self._free):
            got = min(count, missing)
            at = self._free.index((slab, first, count))
            self._free[at : at + 1] = [(slab, first + got, count - got)] if got < count else []
            ranges.append((slab, first, got))
            missing -= got
            if missing == 0:
                break
        self.used += sum(count for *_, count in ranges) * GRAIN
        self.peak = max(self.peak, self.used)
        pieces, left = [], nbytes
        for slab, first, count in ranges:
            size = min(left, count * GRAIN)
            pieces.append(self._slabs[slab][first * GRAIN :][:size])
            left -= size
        return Lent(pieces, ranges)

    def give_back(self, lent: Lent) -> None:
        """The memory may be lent again: what copies to or from it comes before what the next one is told."""
        self.used -= sum(count for *_, count in lent.ranges) * GRAIN
        merged: list[tuple[int, int, int]] = []
        for slab, first, count in sorted([*self._free, *lent.ranges]):
            if merged and merged[-1][0] == slab and merged[-1][1] + merged[-1][2] == first:
                merged[-1] = slab, merged[-1][1], merged[-1][2] + count
            else:
                merged.append((slab, first, count))
        self._free = merged

    def close(self) -> None:
        """Lets go of all memory, which no copy uses any more and no device knows."""
        self._slabs.clear()
        self._free.clear()
        self.nbytes = self.used = 0

    def _grow(self, grains: int) -> bool:
        room = self._room(self.nbytes)
        missing = (grains - sum(count for *_, count in self._free)) * GRAIN
        size = max(missing, SLAB) if room is None else max(missing, min(SLAB, room // GRAIN * GRAIN))
        if room is not None and size > room:
            return False
        try:
            memory = fresh_pages(size)
        except OSError:
            return False
        self._locks = self._locks and self._lock(memory)
        if not self._locks:
            # Resident from now on, as locked memory is: what is counted is what is there.
            memory.zero_()
        self._free.append((len(self._slabs), 0, size // GRAIN))
        self._slabs.append(memory)
        self.nbytes += size
        return True
