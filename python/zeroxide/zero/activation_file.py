"""A file without a name that activations are appended to in forward and read from in backward, a segment at a time.

What is appended is copied into a buffer. A full buffer is a segment: it goes to the disk while the next one fills, and
the buffer serves another when the disk has it. Segments that are read again come back into the same buffers, those
before the one in use ahead of time, as backward goes. So memory is that of the buffers, whatever is in the file, and
the disk sees long transfers alone. A segment has a checksum, which is compared when it comes back. Its place in the
file is another's when nobody needs what it has.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zeroxide import _core
from zeroxide.device.placement import fresh_pages, spec
from zeroxide.errors import StorageError

__all__ = ["BUFFERS", "ActivationFile", "Piece"]

BUFFERS = 4
"""One that fills, two on their way, and one for what the disk does not do at once."""
PAGE = 4096
"""Offsets and lengths are multiples of it, so that transfers go past the page cache."""
LINE = 64
"""Bytes that what is appended begins at a multiple of."""
BLOCK = 1 << 20
"""Most bytes of one request to the kernel."""


class _Segment:
    """A buffer's contents, wherever they are."""

    __slots__ = ("checksum", "failed", "filled", "live", "number", "place")

    def __init__(self, number: int, place: int) -> None:
        self.number = number
        """Counts segments in the order in which they are begun."""
        self.place = place
        self.filled = 0
        self.live = 0
        """Pieces that somebody needs."""
        self.checksum = 0
        self.failed: StorageError | None = None
        """Why it is neither in memory nor on disk."""


class _Buffer:
    """Memory with a queue of its own, which has one transfer at a time."""

    __slots__ = ("memory", "moving", "queue", "segment", "used")

    def __init__(self, memory: torch.Tensor, queue: _core.FileQueue) -> None:
        self.memory = memory
        self.queue = queue
        self.segment: _Segment | None = None
        self.moving: str | None = None
        """"read" or "write" until somebody has waited for it."""
        self.used = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a segment."""

    segment: _Segment
    start: int
    nbytes: int


class ActivationFile:
    """The file of one engine. One thread at a time calls it.

    directory: made if it is missing, with the name of the file gone from it at once. nbytes: memory of the buffers.
    reserved: bytes of the file, taken now and never exceeded; None takes more as it is needed. engine, depth: of the
    queue. Raises StorageError, as every method does where the disk refuses, or gives back other bytes than it took.
    """

    def __init__(self, directory: Path, nbytes: int, reserved: int | None, engine: str, depth: int) -> None:
        self.directory = directory
        self.size = nbytes // BUFFERS // PAGE * PAGE
        """Bytes of a segment."""
        self.limit = None if reserved is None else reserved // self.size
        self.written = self.read = 0
        """Bytes of transfers, once they have begun."""
        self.most = 0
        """The most bytes of the file that were in use at once."""
        self._descriptor = _open_nameless(directory, 0 if self.limit is None else self.limit * self.size)
        try:
            memory = fresh_pages(BUFFERS * self.size)
            block = min(self.size, BLOCK)
            self._buffers = [
                _Buffer(memory[at : at + self.size], _core.FileQueue(engine, depth, 2, block))
                for at in range(0, BUFFERS * self.size, self.size)
            ]
        except BaseException:
            os.close(self._descriptor)
            raise
        self._path = f"/proc/self/fd/{self._descriptor}"
        self._filling: _Buffer | None = None
        self._segments: dict[int, _Segment] = {}
        """By number, in that order, those that have something that is needed."""
        self._free: list[int] = []
        self._places = self._begun = self._uses = 0
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return BUFFERS * self.size

    def room(self) -> int | None:
        """Bytes that may still be appended; None without a limit."""
        if self.limit is None:
            return None
        rest = 0 if self._filling is None else self.size - _segment_of(self._filling).filled
        return rest + (self.limit - len(self._segments)) * self.size

    def append(self, data: torch.Tensor) -> list[Piece]:
        """Takes flat bytes, which are the caller's again on return."""
        pieces: list[Piece] = []
        at = 0
        try:
            while at < data.numel():
                buffer = self._filling or self._begin()
                segment = _segment_of(buffer)
                count = min(data.numel() - at, self.size - segment.filled)
                buffer.memory[segment.filled : segment.filled + count].copy_(data[at : at + count])
                pieces.append(Piece(segment, segment.filled, count))
                segment.live += 1
                segment.filled = min(self.size, -(-(segment.filled + count) // LINE) * LINE)
                at += count
                if segment.filled == self.size:
                    self._seal(buffer, segment)
        except BaseException:
            self.release(pieces)
            raise
        return pieces

    def fetch(self, pieces: Sequence[Piece], target: torch.Tensor) -> None:
        """Fills `target`, flat bytes, with what was appended."""
        at = 0
        for piece in pieces:
            memory = self._memory_of(piece.segment)
            target[at : at + piece.nbytes].copy_(memory[piece.start : piece.start + piece.nbytes])
            at += piece.nbytes

    def read_ahead(self, before: Piece, count: int) -> None:
        """Begins to read up to `count` segments from before that of a piece, where buffers have nothing to keep."""
        for segment in reversed(list(self._segments.values())):
            if count == 0:
                return
            if segment.number >= before.segment.number:
                continue
            count -= 1
            if segment.failed is None and self._holder(segment) is None:
                free = next((each for each in self._buffers if each.segment is None), None)
                if free is None:
                    return
                self._begin_reading(free, segment)

    def release(self, pieces: Sequence[Piece]) -> None:
        """Nobody needs them any more."""
        for piece in pieces:
            segment = piece.segment
            segment.live -= 1
            if segment.live or self._closed:
                continue
            buffer = self._holder(segment)
            if buffer is not None and buffer is self._filling:
                segment.filled = 0
                continue
            if buffer is not None:
                self._end_transfer(buffer)
                buffer.segment = None
            self._forget(segment)

    def close(self) -> None:
        """Waits for transfers under way; the file's room goes back to the disk. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for buffer in self._buffers:
            self._end_transfer(buffer)
        self._buffers.clear()
        self._filling = None
        os.close(self._descriptor)

    def _begin(self) -> _Buffer:
        """A buffer that fills."""
        buffer = self._take_buffer()
        if self._free:
            place = self._free.pop()
        else:
            place, self._places = self._places, self._places + 1
        self._begun += 1
        buffer.segment = self._segments[self._begun] = _Segment(self._begun, place)
        self.most = max(self.most, len(self._segments) * self.size)
        self._filling = buffer
        return buffer

    def _seal(self, buffer: _Buffer, segment: _Segment) -> None:
        """The buffer is full: it goes to the disk."""
        self._filling = None
        self._use(buffer)
        segment.checksum = _core.checksum(spec(buffer.memory))
        try:
            buffer.queue.write(spec(buffer.memory), self._path, segment.place * self.size)
        except StorageError as error:
            buffer.segment, segment.failed = None, self._named(error, "written")
            raise segment.failed from error
        buffer.moving = "write"
        self.written += self.size

    def _take_buffer(self) -> _Buffer:
        """A buffer that has nothing to keep: the one that was used longest ago, when the disk has its contents."""
        others = [each for each in self._buffers if each is not self._filling]
        found = min(others, key=lambda each: (each.segment is not None, each.used))
        self._finish(found)
        found.segment = None
        self._use(found)
        return found

    def _memory_of(self, segment: _Segment) -> torch.Tensor:
        """Where the segment's bytes are, when they have come."""
        buffer = self._holder(segment)
        if buffer is None:
            if segment.failed is not None:
                raise segment.failed
            buffer = self._take_buffer()
            self._begin_reading(buffer, segment)
        if buffer.moving == "read":
            self._finish(buffer)
        self._use(buffer)
        return buffer.memory

    def _begin_reading(self, buffer: _Buffer, segment: _Segment) -> None:
        try:
            buffer.queue.read(spec(buffer.memory), self._path, segment.place * self.size)
        except StorageError as error:
            segment.failed = self._named(error, "read")
            raise segment.failed from error
        buffer.segment, buffer.moving = segment, "read"
        self.read += self.size
        self._use(buffer)

    def _finish(self, buffer: _Buffer) -> None:
        """Waits for the buffer's transfer, and looks what has come."""
        moving, buffer.moving = buffer.moving, None
        if moving is None:
            return
        segment = _segment_of(buffer)
        try:
            buffer.queue.wait()
        except StorageError as error:
            buffer.segment, segment.failed = None, self._named(error, "read" if moving == "read" else "written")
            raise segment.failed from error
        if moving == "read" and _core.checksum(spec(buffer.memory)) != segment.checksum:
            buffer.segment, segment.failed = (
                None,
                StorageError(
                    f"activations in {self.directory}: {self.size} bytes at {segment.place * self.size} of the file "
                    "have another checksum than when they were written: the disk or its driver has changed them",
                    path=self.directory,
                ),
            )
            raise segment.failed

    def _end_transfer(self, buffer: _Buffer) -> None:
        """Waits for a transfer of what nobody needs: how it ends is nobody's matter."""
        if buffer.moving is not None:
            buffer.moving = None
            try:
                buffer.queue.wait()
            except StorageError:
                return

    def _forget(self, segment: _Segment) -> None:
        del self._segments[segment.number]
        self._free.append(segment.place)

    def _holder(self, segment: _Segment) -> _Buffer | None:
        return next((each for each in self._buffers if each.segment is segment), None)

    def _use(self, buffer: _Buffer) -> None:
        self._uses += 1
        buffer.used = self._uses

    def _named(self, error: StorageError, what: str) -> StorageError:
        """The error with the directory in place of a file without a name."""
        reason = str(error).replace(self._path, "the file")
        return StorageError(
            f"activations in {self.directory} could not be {what}: {reason}", path=self.directory, errno=error.errno
        )


def _segment_of(buffer: _Buffer) -> _Segment:
    assert buffer.segment is not None, "it has one"
    return buffer.segment


def _open_nameless(directory: Path, reserved: int) -> int:
    """A descriptor of a file that ends with it, with so many bytes reserved on disk."""
    path = directory / f"zeroxide-{os.getpid()}-{secrets.token_hex(4)}.activations"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refused(directory, "the file cannot be made there", error) from error
    try:
        path.unlink()
        if reserved:
            os.posix_fallocate(descriptor, 0, reserved)
    except OSError as error:
        os.close(descriptor)
        raise _refused(directory, f"{reserved} bytes cannot be reserved", error) from error
    return descriptor


def _refused(directory: Path, what: str, error: OSError) -> StorageError:
    return StorageError(f"activations in {directory}: {what}: {error.strerror}", path=directory, errno=error.errno)
