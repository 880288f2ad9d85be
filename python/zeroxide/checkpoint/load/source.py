"""Reading the files of a checkpoint: verified once as a whole, then ranges of tensors into reused memory.

With several ranks each file is verified by one of them, so that together they read the checkpoint once before anything
changes; after that every rank reads the ranges that it needs.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.format.header import read_header
from zeroxide.checkpoint.format.manifest import Piece, SavedFile, looks_pickled
from zeroxide.checkpoint.format.stream import DTYPES, SAVED, bytes_of, read_scattered, stored_dtype
from zeroxide.checkpoint.live_state import Staging
from zeroxide.checkpoint.load.open_files import OpenFiles
from zeroxide.checkpoint.load.regions import PieceMap
from zeroxide.checkpoint.load.scatter import ScatteredRead
from zeroxide.checkpoint.load.verify import checksums
from zeroxide.errors import CheckpointError
from zeroxide.params.part import Region

__all__ = ["Sources"]

VERIFY_THREADS = 4


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its bytes are `begin .. end` of the file."""

    dtype: torch.dtype
    numel: int
    begin: int
    end: int


class _File:
    """One file. It is read only while it is still the file that this was made of, before it was verified."""

    def __init__(self, path: Path, expected: SavedFile, kept_open: OpenFiles) -> None:
        self.path = path
        self._expected = expected
        self._kept_open = kept_open
        self.tensors: dict[str, _Stored] = {}
        with self._open() as descriptor:
            self._identity = _identity(descriptor)
            size = os.fstat(descriptor).st_size
            if size != expected.bytes:
                raise CheckpointError(
                    f"{self.path} is damaged: it should have {expected.bytes} bytes and has {size}; load another "
                    "checkpoint",
                    path=self.path.parent,
                )

    def read_header(self) -> None:
        """Finds the tensors. Raises CheckpointError if this is no safetensors file."""
        with self._open() as descriptor:
            self._check_same(descriptor)
            try:
                self.tensors = _tensors(descriptor)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path} is not a safetensors file: {error}", path=self.path.parent
                ) from None

    @contextmanager
    def _open(self) -> Iterator[int]:
        with self._errors():
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.path} is missing: the checkpoint is not complete; load another one", path=self.path.parent
            ) from None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}", path=self.path.parent) from None

    def verify(self) -> None:
        """Reads all of it. Raises CheckpointError where the checksum is not the one of the manifest."""
        with self._open() as descriptor:
            self._check_same(descriptor)
            expected, found = checksums(descriptor, self._expected)
            if found == expected:
                return
            if looks_pickled(os.pread(descriptor, 8, 0)):
                raise CheckpointError(
                    f"{self.path} is a Python pickle, which can run code when it is read: zeroxide does not read "
                    "pickles",
                    path=self.path.parent,
                )
            raise CheckpointError(
                f"{self.path} is damaged: its checksum should be {expected} and is {found}; load another checkpoint",
                path=self.path.parent,
            )

    def _check_same(self, descriptor: int) -> None:
        if _identity(descriptor) != self._identity:
            raise CheckpointError(f"{self.path} has changed while it was being loaded", path=self.path.parent)

    def read(self, into: Sequence[memoryview], start: int) -> None:
        """Bytes `start ..` of the file into places, one after the other. The file stays open."""
        with self._errors():
            descriptor = self._kept_open.descriptor(self.path)
            self._check_same(descriptor)
            count = read_scattered(descriptor, into, start)
            if count < sum(each.nbytes for each in into):
                raise CheckpointError(f"{self.path} ends at byte {start + count}", path=self.path.parent)


class Sources:
    """The files of a checkpoint that one load needs, each verified before this exists. Raises CheckpointError.

    `needed` is what the ranks of `sharing` (`team`, where it is None) need, the same on each of them: each verifies its
    share. Every rank of `team` must make one.
    """

    def __init__(
        self,
        directory: Path,
        files: Sequence[SavedFile],
        needed: Sequence[Piece],
        staging: Staging,
        team: Team,
        sharing: Team | None = None,
    ) -> None:
        names = {piece.file for piece in needed}
        wanted = [file for file in files if file.name in names]
        mine = _share(wanted, sharing or team)
        self._directory = directory
        self._staging = staging
        self._files: dict[str, _File] = {}
        self._kept_open = OpenFiles()
        # Whoever holds this to the end of the program, or an error that does, need not close it.
        weakref.finalize(self, self._kept_open.close)
        pieces: dict[str, list[Piece]] = {}
        for piece in needed:
            pieces.setdefault(piece.file, []).append(piece)

        def check(act: Callable[[SavedFile], None], which: Sequence[SavedFile]) -> None:
            threads = max(1, min(VERIFY_THREADS, len(os.sched_getaffinity(0)), len(which)))
            with ThreadPoolExecutor(threads, thread_name_prefix="zeroxide-verify") as pool:
                list(pool.map(act, which))

        def verify(file: SavedFile) -> None:
            self._files[file.name].verify()
            self._files[file.name].read_header()
            self._check_pieces(pieces[file.name])

        # What a rank remembers of a file is older than the verification of any rank, so a later change is noticed.
        team.together(lambda: check(self._look, wanted), directory)
        team.together(lambda: check(verify, mine), directory)

    def _look(self, file: SavedFile) -> None:
        self._files[file.name] = _File(self._directory / file.name, file, self._kept_open)

    def _check_pieces(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            stored = self._files[piece.file].tensors.get(piece.key)
            dtype = SAVED[piece.dtype]
            as_stored = stored_dtype(dtype)
            count = piece.count * dtype.itemsize // as_stored.itemsize
            if stored is None or (stored.dtype, stored.numel) != (as_stored, count):
                raise CheckpointError(
                    f"{self._directory / piece.file} does not hold {piece.key} as {piece.dtype} of {piece.count} "
                    "elements, which the manifest says",
                    path=self._directory,
                )

    def chunks(
        self, pieces: Sequence[Piece], start: int, count: int, shape: Sequence[int], region: Region | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, elements as stored) for elements `start .. start + count` of a tensor of `shape`, or of a
        region of it.

        Each chunk is valid until the next one is taken. Reads nothing else than these elements and small gaps between
        them. Files stay open until `close`.
        """
        filled, values = 0, self._staging.values[:0]
        begin, end = start, start + count
        reads: dict[tuple[str, str], ScatteredRead] = {}
        for at, piece, inside, left in PieceMap(pieces, shape).of_region(region, start, count):
            file = self._files[piece.file]
            if not file.tensors:
                file.read_header()
            stored = file.tensors[piece.key]
            read = reads.get((piece.file, piece.key))
            if read is None:
                read = reads[piece.file, piece.key] = ScatteredRead(file.read)
            while left:
                if not filled:
                    begin = at
                    values = self._staging.stored(SAVED[piece.dtype], min(end - at, self._staging.elements))
                take, size = min(left, values.numel() - filled), values.itemsize
                first = stored.begin + inside * size
                assert first + take * size <= stored.end, "the range is inside the tensor"
                read.add(first, bytes_of(values[filled : filled + take]))
                at, inside, left, filled = at + take, inside + take, left - take, filled + take
                if filled == values.numel():
                    for each in reads.values():
                        each.flush()
                    yield begin, values
                    filled = 0
        assert not filled, "the pieces of a tensor have all of its elements"

    def close(self) -> None:
        """Closes the files; they are opened again where they are read again."""
        self._kept_open.close()


def _share(files: Sequence[SavedFile], team: Team) -> list[SavedFile]:
    """The files that this rank verifies: the largest first, each to the rank that has least to read so far."""
    loads = [0] * team.world
    mine = []
    for file in sorted(files, key=lambda each: (-each.bytes, each.name)):
        rank = loads.index(min(loads))
        loads[rank] += file.bytes
        if rank == team.rank:
            mine.append(file)
    return mine


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _tensors(descriptor: int) -> dict[str, _Stored]:
    """The tensors of a safetensors file. Raises ValueError if it is not one, or has a dtype that none of ours has."""
    tensors = {}
    for key, entry in read_header(descriptor).items():
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ValueError(f"{key} has dtype {entry.dtype}")
        tensors[key] = _Stored(dtype, (entry.end - entry.begin) // dtype.itemsize, entry.begin, entry.end)
    return tensors
