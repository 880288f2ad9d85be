"""Memory in which state waits to be written while training goes on: a bounded number of bytes, taken in slabs.

Chunks are cut from the front of a slab, one after the other, and a slab is used again when all of its chunks have been
written. Slabs are mapped by themselves, so that they go back to the system whatever the allocator is told to keep.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from zeroxide.checkpoint.format.mapping import mapped
from zeroxide.checkpoint.live_state import Staging
from zeroxide.device.placement import of_buffer

__all__ = ["Slab", "SlabStaging", "Slabs", "SnapshotEnded", "available_memory"]

SLAB_BYTES = 32 << 20
ALIGN = 64


class SnapshotEnded(Exception):
    """Nobody will write what is captured: the writer has failed."""


class Slab:
    """One mapping, how much of it is taken, and how many of its chunks are not written yet."""

    def __init__(self, size: int) -> None:
        self.memory = of_buffer(mapped(size), torch.uint8)
        self.taken = 0
        self.waiting = 0


class Slabs:
    """At most `limit` bytes, but always at least two chunks of `chunk` bytes. One thread takes, another gives back."""

    def __init__(self, limit: int, chunk: int) -> None:
        self._size = max(chunk + ALIGN, min(SLAB_BYTES, limit // 2))
        self._most = max(2, limit // self._size)
        self._changed = threading.Condition()
        self._current: Slab | None = None
        self._free: list[Slab] = []
        self._held = 0
        self._refill = True
        self._ended = False
        self.peak = 0
        """Most bytes that were held at once."""

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held * self._size

    def take(self, size: int) -> tuple[Slab, torch.Tensor]:
        """Memory for a chunk, when there is room. Raises SnapshotEnded."""
        with self._changed:
            slab = self._current
            if slab is None or slab.taken + size > self._size:
                self._leave_current()
                slab = self._current = self._next()
            start = slab.taken
            slab.taken += -(-size // ALIGN) * ALIGN
            slab.waiting += 1
            return slab, slab.memory[start : start + size]

    def _leave_current(self) -> None:
        slab, self._current = self._current, None
        if slab is not None and not slab.waiting:
            self._put_away(slab)

    def _next(self) -> Slab:
        while True:
            if self._ended:
                raise SnapshotEnded
            if self._free:
                return self._free.pop()
            if self._held < self._most:
                self._held += 1
                self.peak = max(self.peak, self.held)
                return Slab(self._size)
            self._changed.wait()

    def give_back(self, slab: Slab) -> None:
        """One chunk of the slab has been written."""
        with self._changed:
            slab.waiting -= 1
            if not slab.waiting and slab is not self._current:
                self._put_away(slab)

    def _put_away(self, slab: Slab) -> None:
        slab.taken = 0
        if self._refill:
            self._free.append(slab)
            self._changed.notify_all()
        else:
            self._held -= 1

    def no_more(self) -> None:
        """Everything has been taken: from now on a slab goes back to the system when it has been written."""
        with self._changed:
            self._refill = False
            self._held -= len(self._free)
            self._free.clear()
            self._leave_current()

    def end(self) -> None:
        """Lets whoever waits for room, now or later, raise SnapshotEnded."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class SlabStaging(Staging):
    """Staging whose stored chunks are each new memory, so that they outlive the next one."""

    def __init__(self, slabs: Slabs) -> None:
        super().__init__()
        self._slabs = slabs
        self._last: Slab | None = None

    def stored(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Room for up to `count` elements, in a slab. Raises SnapshotEnded."""
        count = min(count, self.elements)
        self._last, memory = self._slabs.take(count * dtype.itemsize)
        return memory.view(dtype)

    def last(self) -> Slab | None:
        """The slab of the chunk that was stored last, told once; None for what came from elsewhere."""
        slab, self._last = self._last, None
        return slab


def available_memory() -> int:
    """Bytes that this process could take without swapping: the system's, or what its control group leaves."""
    found = [1 << 62]
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    most, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if most.isdigit() and used.isdigit():
        found.append(max(0, int(most) - int(used)))
    return min(found) if len(found) > 1 else 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
