"""Reading the files of a checkpoint: verified once as a whole, then a chunk at a time into reused memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from zeroxide.checkpoint.contents import Staging
from zeroxide.checkpoint.manifest import Piece, SavedFile, looks_pickled
from zeroxide.checkpoint.stream import DTYPES, bytes_of, digest
from zeroxide.errors import CheckpointError

__all__ = ["Sources"]

MAX_HEADER_BYTES = 100 << 20
"""As in the reference implementation of the format."""
VERIFY_THREADS = 4


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its bytes are `begin .. end` of the file."""

    dtype: torch.dtype
    numel: int
    begin: int
    end: int


class _File:
    """One file that has been verified. It is read only while it is still the file that was verified."""

    def __init__(self, path: Path, expected: SavedFile) -> None:
        self.path = path
        with self._open() as descriptor:
            self._identity = _identity(descriptor)
            self._verify(descriptor, expected)
            try:
                self.tensors = _read_header(descriptor, expected.bytes)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise CheckpointError(f"{path} is not a safetensors file: {error}", path=path.parent) from None

    @contextmanager
    def _open(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.path} is missing: the checkpoint is not complete; load another one", path=self.path.parent
            ) from None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}", path=self.path.parent) from None
        try:
            yield descriptor
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}", path=self.path.parent) from None
        finally:
            os.close(descriptor)

    def _verify(self, descriptor: int, expected: SavedFile) -> None:
        size = os.fstat(descriptor).st_size
        if size != expected.bytes:
            raise CheckpointError(
                f"{self.path} is damaged: it should have {expected.bytes} bytes and has {size}; load another "
                "checkpoint",
                path=self.path.parent,
            )
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            found = hashlib.file_digest(file, digest).hexdigest()
        if found == expected.blake2b:
            return
        if looks_pickled(os.pread(descriptor, 8, 0)):
            raise CheckpointError(
                f"{self.path} is a Python pickle, which can run code when it is read: zeroxide does not read pickles",
                path=self.path.parent,
            )
        raise CheckpointError(
            f"{self.path} is damaged: its checksum should be {expected.blake2b} and is {found}; load another "
            "checkpoint",
            path=self.path.parent,
        )

    def read(self, stored: _Stored, start: int, into: torch.Tensor) -> None:
        """Elements `start ..` of a tensor into contiguous memory of its dtype."""
        view = bytes_of(into)
        at = stored.begin + start * stored.dtype.itemsize
        assert at + view.nbytes <= stored.end, "the range is inside the tensor"
        with self._open() as descriptor:
            if _identity(descriptor) != self._identity:
                raise CheckpointError(f"{self.path} has changed while it was being loaded", path=self.path.parent)
            while view.nbytes:
                count = os.preadv(descriptor, [view], at)
                if count == 0:
                    raise CheckpointError(f"{self.path} ends at byte {at}", path=self.path.parent)
                view, at = view[count:], at + count


class Sources:
    """The files of a checkpoint that one load needs, each verified before this exists. Raises CheckpointError."""

    def __init__(self, directory: Path, files: Sequence[SavedFile], needed: Sequence[Piece], staging: Staging) -> None:
        names = {piece.file for piece in needed}
        wanted = [file for file in files if file.name in names]
        threads = max(1, min(VERIFY_THREADS, len(os.sched_getaffinity(0)), len(wanted)))
        with ThreadPoolExecutor(threads, thread_name_prefix="zeroxide-verify") as pool:
            verified = list(pool.map(lambda file: _File(directory / file.name, file), wanted))
        self._files = {file.path.name: file for file in verified}
        self._staging = staging
        for piece in needed:
            stored = self._files[piece.file].tensors.get(piece.key)
            if stored is None or (stored.dtype, stored.numel) != (DTYPES[piece.dtype], piece.count):
                raise CheckpointError(
                    f"{directory / piece.file} does not hold {piece.key} as {piece.dtype} of {piece.count} elements, "
                    "which the manifest says",
                    path=directory,
                )

    def chunks(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, elements as stored) for all of a tensor. Each chunk is valid until the next one is taken."""
        for piece in pieces:
            file = self._files[piece.file]
            stored = file.tensors[piece.key]
            at = 0
            while at < piece.count:
                values = self._staging.stored(stored.dtype, min(piece.count - at, self._staging.elements))
                file.read(stored, at, values)
                yield piece.start + at, values
                at += values.numel()


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_header(descriptor: int, size: int) -> dict[str, _Stored]:
    """The tensors of a safetensors file. Raises ValueError, TypeError or KeyError if it is not one."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"a header of {length} bytes")
    start = 8 + length
    described = json.loads(os.pread(descriptor, length, 8))
    described.pop("__metadata__", None)
    tensors = {}
    for key, entry in described.items():
        dtype = DTYPES[entry["dtype"]]
        numel = prod(entry["shape"])
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= size - start or end - begin != numel * dtype.itemsize:
            raise ValueError(f"{key} is at bytes {begin} to {end}")
        tensors[key] = _Stored(dtype, numel, start + begin, start + end)
    return tensors
