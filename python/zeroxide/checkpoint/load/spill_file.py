"""Present values of parameters that a load leaves alone, while the rest of their unit is filled.

The core fills whole units. What a unit keeps goes through a file that has no name and is as long as the largest unit
needs, allocated before anything changes: memory stays bounded, and a full disk is found in time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

from zeroxide.checkpoint.contents import ElementRange, value_dtype
from zeroxide.checkpoint.format.stream import bytes_of, read_into, write_all
from zeroxide.checkpoint.live_state import LiveState, Staging

__all__ = ["SpillFile"]


class SpillFile:
    """Room on disk for `nbytes` of values. A context manager. Raises OSError."""

    def __init__(self, nbytes: int, directory: Path | None, live: LiveState, staging: Staging) -> None:
        self._live = live
        self._staging = staging
        self._places: dict[tuple[int, int, str, int], int] = {}
        self._file = tempfile.TemporaryFile(dir=directory) if nbytes else None  # noqa: SIM115
        if self._file is not None:
            os.posix_fallocate(self._file.fileno(), 0, nbytes)

    def __enter__(self) -> SpillFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the room back. Idempotent."""
        if self._file is not None:
            self._file.close()

    def start_unit(self) -> None:
        """Forgets what was kept of the last unit."""
        self._places.clear()
        if self._file is not None:
            self._file.seek(0)

    def keep(self, run: ElementRange, part: str) -> None:
        """Copies the present values of one part of a run."""
        assert self._file is not None, "room was asked for"
        descriptor = self._file.fileno()
        self._places[run.held.unit, run.held.position, part, run.start] = os.lseek(descriptor, 0, os.SEEK_CUR)
        for values in self._live.chunks(run.held, part, run.start, run.count, value_dtype(run.held, part)):
            write_all(descriptor, bytes_of(values))

    def chunks(self, run: ElementRange, part: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, values) of what was kept. Each chunk is valid until the next one is taken."""
        assert self._file is not None, "something was kept"
        at = self._places[run.held.unit, run.held.position, part, run.start]
        dtype, start = value_dtype(run.held, part), 0
        while start < run.count:
            values = self._staging.stored(dtype, min(self._staging.elements, run.count - start))
            view = bytes_of(values)
            count = read_into(self._file.fileno(), view, at + start * dtype.itemsize)
            assert count == view.nbytes, "what was kept is all there"
            yield run.start + start, values
            start += values.numel()
