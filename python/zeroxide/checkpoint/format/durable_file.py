"""A new file that is written front to back past the page cache, with a checksum of all of it.

What is written is copied once, into memory that the disk can be written from directly, and its checksum is taken on the
way. A thread writes one buffer while the other one fills. Through the page cache the same bytes would take the
processor several times as long, beside training that has other use for it.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from pathlib import Path

import torch

from zeroxide import _core
from zeroxide.checkpoint.format.mapping import HUGE_PAGE, mapped
from zeroxide.device.placement import address, of_buffer, spec

__all__ = ["WRITE_MEMORY", "DurableFile", "write_all"]

ALIGN = 4096
"""What offset, length and address must be multiples of to be written directly."""
BUFFER_BYTES = 4 << 20
BUFFERS = 2
WRITE_MEMORY = BUFFERS * BUFFER_BYTES
"""Bytes that writing one file takes."""


class DurableFile:
    """A file that must not be there yet, of about `size` bytes; smaller ones go through the page cache.

    Only `finish` makes it complete. All methods raise OSError.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.bytes = 0
        self._checksum = _core.FileChecksum()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct: _DirectWriter | None = None
        if size > BUFFERS * BUFFER_BYTES:
            try:
                self._direct = _opened_directly(path, self._descriptor)
            except BaseException:
                os.close(self._descriptor)
                raise

    def write(self, data: torch.Tensor) -> None:
        """Appends a flat tensor of bytes in host memory, which may change afterwards."""
        self.bytes += data.numel()
        if self._direct is None:
            self._checksum.update(spec(data))
            write_all(self._descriptor, data.numpy().data)
            return
        while data.numel():
            room = self._direct.room()
            part, data = data[: room.numel()], data[room.numel() :]
            self._checksum.copy(spec(part), spec(room[: part.numel()]))
            self._direct.filled(part.numel())

    def finish(self) -> str:
        """Makes all of it durable; returns its checksum, CRC-64/NVME in hex."""
        if self._direct is not None:
            end = self._direct.finish()
            # The last page is not full, and is written as any file is.
            os.lseek(self._descriptor, self.bytes - end.nbytes, os.SEEK_SET)
            write_all(self._descriptor, end)
        os.fsync(self._descriptor)
        return self._checksum.hexdigest()

    def close(self) -> None:
        """Closes the file, complete or not. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            if self._direct is not None:
                self._direct.close()
        finally:
            os.close(descriptor)


def _opened_directly(path: Path, cached: int) -> _DirectWriter | None:
    """None where the file system has no direct writes."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    try:
        return _DirectWriter(descriptor, cached)
    except BaseException:
        os.close(descriptor)
        raise


class _Buffer:
    """Memory that starts at a huge page, and how much of it is filled.

    A direct write names every page of its memory to the disk: huge ones are few.
    """

    def __init__(self) -> None:
        mapping = mapped(BUFFER_BYTES + HUGE_PAGE)
        memory = of_buffer(mapping, torch.uint8)
        start = -address(memory) % HUGE_PAGE
        self._mapping, self._start = mapping, start
        self.memory = memory[start : start + BUFFER_BYTES]
        self.filled = 0

    def view(self, start: int, end: int) -> memoryview:
        """Bytes `start .. end` of the memory."""
        return memoryview(self._mapping)[self._start + start : self._start + end]


class _DirectWriter:
    """Buffers that take turns: one is filled while a thread writes the other one.

    descriptor: of the file, opened for direct writes, which is closed at the end; cached: of the same file otherwise.
    """

    def __init__(self, descriptor: int, cached: int) -> None:
        self._descriptor = descriptor
        self._cached = cached
        self._written = 0
        self._in_pages = True
        self._error: BaseException | None = None
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(_Buffer())
        self._full: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._filling: _Buffer | None = None
        self._thread = threading.Thread(target=self._run, name="zeroxide-write")
        self._thread.start()

    def room(self) -> torch.Tensor:
        """Where the next bytes go: at least one. Waits for the disk. Raises what writing raised."""
        buffer = self._filling
        if buffer is None:
            buffer = self._filling = self._free.get()
            if self._error is not None:
                raise self._error
        return buffer.memory[buffer.filled :]

    def filled(self, count: int) -> None:
        """So many bytes of the room are to be written."""
        buffer = self._filling
        assert buffer is not None, "there was room"
        buffer.filled += count
        if buffer.filled == BUFFER_BYTES:
            self._filling = None
            self._full.put(buffer)

    def finish(self) -> memoryview:
        """Writes all whole pages; returns what is left. Raises what writing raised."""
        last, self._filling = self._filling, None
        left = memoryview(b"")
        if last is not None:
            pages = last.filled - last.filled % ALIGN
            left = last.view(pages, last.filled)
            last.filled = pages
            self._full.put(last)
        self._end()
        if self._error is not None:
            raise self._error
        return left

    def close(self) -> None:
        """Ends the thread when it has written what it was given."""
        self._end()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _end(self) -> None:
        if self._thread.is_alive():
            self._full.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (buffer := self._full.get()) is not None:
            if self._error is None:
                try:
                    with buffer.view(0, buffer.filled) as data:
                        self._write(data)
                except BaseException as error:
                    self._error = error
            buffer.filled = 0
            self._free.put(buffer)

    def _write(self, data: memoryview) -> None:
        while self._in_pages and data.nbytes:
            count = os.write(self._descriptor, data)
            self._written += count
            data = data[count:]
            if count % ALIGN:
                # A disk that is nearly full takes a part of a page: whether there is room for the rest, the page
                # cache finds out.
                self._in_pages = False
                os.lseek(self._cached, self._written, os.SEEK_SET)
        write_all(self._cached, data)


def write_all(descriptor: int, data: memoryview) -> None:
    """Writes every byte of `data`, however many calls that takes. Raises OSError."""
    while data.nbytes:
        data = data[os.write(descriptor, data) :]
