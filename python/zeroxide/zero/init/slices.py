"""Parameters before there is an engine: each rank keeps a slice of every one.

A parameter of n elements is cut into equal slices of ceil(n / ranks), the last one shorter or empty. Its values are
those of one rank, given to the others when it is cut.
"""

from __future__ import annotations

import mmap
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from zeroxide.device.placement import HOST, of_buffer
from zeroxide.distributed import Ranks, all_gather_single
from zeroxide.errors import ModelError, StorageError
from zeroxide.params.empty import conceal, reveal
from zeroxide.params.handle import handle_of, manage, new_id
from zeroxide.precision.bits import bytes_of, fingerprint

__all__ = ["Slice", "SliceFile", "slice_of"]

CHUNK = 64 << 20
"""Bytes of the file that are mapped at once."""
PAGE = 4096
PIECE = 4 << 20
"""Bytes of a slice in the file that are copied at once."""
TRIES = 8
"""How often a directory that vanishes is made again."""


class SliceFile:
    """Memory for slices in an unnamed file: the system may write it out, and it does not count as resident.

    Raises StorageError when the directory cannot hold it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.chunk: mmap.mmap | None = None
        self.used = 0

    def take(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """(mapping, offset) of memory for `nbytes`, zero at first."""
        size = -(-nbytes // PAGE) * PAGE
        if self.chunk is None or self.used + size > len(self.chunk):
            try:
                with self._unnamed() as file:
                    file.truncate(max(CHUNK, size))
                    self.chunk = mmap.mmap(file.fileno(), max(CHUNK, size))
            except OSError as error:
                raise StorageError(
                    f"{self.directory}: slices of parameters cannot be kept there: {error.strerror}",
                    path=self.directory,
                    errno=error.errno,
                ) from error
            self.used = 0
        start = self.used
        self.used += size
        return self.chunk, start

    def _unnamed(self) -> IO[bytes]:
        """A file without a name in the directory, which is made where it is missing."""
        for _ in range(TRIES):
            self.directory.mkdir(parents=True, exist_ok=True)
            # An engine that ends, also that of another rank, takes the directory with it if nothing is in it.
            with suppress(FileNotFoundError):
                return tempfile.TemporaryFile(dir=self.directory)
        return tempfile.TemporaryFile(dir=self.directory)


class Slice:
    """Keeps one parameter. `dtype` is that of the slice and of the parameter."""

    persists = False
    in_engine = False

    def __init__(
        self, name: str, param: nn.Parameter, ranks: Ranks, dtype: torch.dtype, file: SliceFile | None
    ) -> None:
        self.ident = new_id()
        self.name = name
        self.shape = param.shape
        self.dtype = dtype
        self.ranks = ranks
        self.each = -(-self.shape.numel() // ranks.world)
        self.holds = 0
        self.stamp = (0, 0)
        self.writers = 0
        self.handed_out: int | None = None
        self.full = True
        nbytes = self.each * dtype.itemsize
        self.mapped = file.take(nbytes) if file is not None and nbytes else None
        if self.mapped is None:
            self.values = torch.empty(self.each, dtype=dtype, device=HOST)
        else:
            self.values = of_buffer(self.mapped[0], dtype, self.mapped[1], self.each)
        manage(param, self)

    @property
    def nbytes(self) -> int:
        """Resident bytes that the slice takes while it is not in use."""
        return 0 if self.mapped is not None else self.values.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a parameter has nobody who keeps its values.
        return type(None), ()

    def available(self) -> bool:
        """Whether the parameter shows its values now."""
        return self.full

    def users(self) -> set[nn.Module]:
        """See `ParamHandle`."""
        return set()

    def local(self) -> torch.Tensor:
        """This rank's elements, without padding."""
        start = self.ranks.rank * self.each
        return self.values[: max(0, min(self.each, self.shape.numel() - start))]

    def cut(self, param: nn.Parameter, source: int = 0) -> None:
        """Takes the parameter's values from rank `source` and empties it, everywhere but in `open`s still to end."""
        values = param.detach()
        flat = bytes_of(values if values.dtype == self.dtype else values.to(self.dtype)).view(self.dtype)
        self.ranks.broadcast_tensor(flat, source)
        local = self.local()
        start = self.ranks.rank * self.each
        self._copy(bytes_of(local), bytes_of(flat[start : start + local.numel()]))
        if self.holds:
            reveal(param, flat.view(self.shape))
        else:
            self.empty(param)

    def hand_out(self, param: nn.Parameter) -> None:
        """See `ParamHandle`. Before there is an engine only a gathered copy is anybody else's."""
        if self.holds and self.handed_out is None:
            self.handed_out = fingerprint(param)

    def changed_by_hand(self, param: nn.Parameter) -> bool:
        """See `ParamHandle`."""
        before, self.handed_out = self.handed_out, None
        return before is not None and before != fingerprint(param)

    def gather(self, param: nn.Parameter) -> None:
        """Gives the parameter all its values."""
        flat = torch.empty(self.each * self.ranks.world, dtype=self.dtype, device=HOST)
        if self.ranks.alone:
            self._copy(bytes_of(flat), bytes_of(self.values))
        elif self.each:
            all_gather_single(bytes_of(flat), bytes_of(self.values), group=self.ranks.group)
            self._drop_pages(0, self.values.nbytes)
        reveal(param, flat[: self.shape.numel()].view(self.shape))
        self.full = True

    def empty(self, param: nn.Parameter) -> None:
        """Takes the values away again; changes are lost."""
        conceal(param, torch.empty(0, dtype=self.dtype, device=HOST))
        self.full = False

    def drop(self) -> None:
        """Gives the slice's memory back: somebody else has the values now."""
        self.full = False
        self.values = torch.empty(0, dtype=self.dtype, device=HOST)
        self.mapped = None

    def open(self, param: nn.Parameter) -> None:
        """See `ParamHandle`."""
        if not self.full:
            self.gather(param)
        self.holds += 1

    def give_up(self, param: nn.Parameter) -> None:
        """See `ParamHandle`."""
        if not self.holds:
            self.empty(param)

    def close(self, param: nn.Parameter, source: int | None) -> None:
        """See `ParamHandle`."""
        self.holds -= 1
        if source is not None:
            fits = param.shape == self.shape and param.dtype == self.dtype
            problems = self.ranks.gather_objects(None if fits else f"{param.dtype} {tuple(param.shape)}")
            if problems[source] is not None:
                self.empty(param)
                raise ModelError(
                    f"{self.name} is {problems[source]} on rank {source} after GatheredParameters: expected "
                    f"{self.dtype} {tuple(self.shape)}; write into the parameter instead of replacing it",
                    name=self.name,
                )
            if not fits:
                param.data = torch.empty(self.shape, dtype=self.dtype, device=HOST)
            self.cut(param, source)
        elif not self.holds:
            self.empty(param)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes to or from the slice. Where it is in a file, a piece at a time, so that no more than a piece of
        it is resident."""
        if self.mapped is None:
            target.copy_(source)
            return
        for start in range(0, target.numel(), PIECE):
            piece = slice(start, start + PIECE)
            target[piece].copy_(source[piece])
            self._drop_pages(start, min(PIECE, target.numel() - start))

    def _drop_pages(self, start: int, nbytes: int) -> None:
        if self.mapped is not None:
            # The file has them; the mapping need not.
            mapping, begin = self.mapped
            mapping.madvise(mmap.MADV_DONTNEED, begin + start, -(-nbytes // PAGE) * PAGE)


def slice_of(param: torch.Tensor) -> Slice | None:
    """The slice that keeps the parameter, if it is one."""
    handle = handle_of(param)
    return handle if isinstance(handle, Slice) else None
