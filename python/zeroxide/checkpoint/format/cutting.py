"""Which tensors go into which file: files end at a size limit, and a tensor that is larger is cut into pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from zeroxide.checkpoint.format.stream import Entry, stored_dtype

__all__ = ["FILE_BYTES", "Cut", "Tensor", "cut_into_files", "whole"]

FILE_BYTES = 2 << 30
"""Largest file that is made of more than one tensor; also the largest piece of one tensor in a checkpoint."""
BLOCK = 64
"""Elements of a block of the state format "compact", which is loaded in whole blocks."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its name, and dtype and shape in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Cut:
    """Elements `start .. start + count` of a tensor: the whole of it, or a flat piece."""

    tensor: Tensor
    start: int
    count: int

    @property
    def entry(self) -> Entry:
        """What stands in the file: pieces carry their element range in the key and are flat.

        So are elements of a dtype that files have no name for, which stand there as bytes.
        """
        whole = self.count == self.tensor.numel
        key = self.tensor.name if whole else f"{self.tensor.name}[{self.start}:{self.start + self.count}]"
        dtype = stored_dtype(self.tensor.dtype)
        if dtype != self.tensor.dtype:
            return Entry(key, dtype, (self.count * self.tensor.dtype.itemsize,))
        return Entry(key, dtype, self.tensor.shape if whole else (self.count,))


def whole(tensors: Iterable[Tensor]) -> list[Cut]:
    """All of each tensor."""
    return [Cut(tensor, 0, tensor.numel) for tensor in tensors]


def cut_into_files(wanted: Iterable[Cut], limit: int, *, pieces: bool) -> list[list[Cut]]:
    """Packs cuts into files of at most `limit` bytes, in order; within a file the wider elements come first.

    What is larger than `limit` is cut further if `pieces`, else it has a file of its own.
    """
    files: list[list[Cut]] = []
    room = 0
    for each in wanted:
        tensor, end = each.tensor, each.start + each.count
        size = tensor.dtype.itemsize
        step = each.count
        if pieces:
            step = max(1, limit // size)
            # A piece ends with a block of elements that share a scale, where it has more than one of them.
            step = step // BLOCK * BLOCK or step
        for start in range(each.start, max(each.start + 1, end), max(1, step)):
            count = min(step, end - start)
            if not files or count * size > room:
                files.append([])
                room = limit
            files[-1].append(Cut(tensor, start, count))
            room -= count * size
    for cuts in files:
        cuts.sort(key=lambda cut: -cut.entry.dtype.itemsize)
    return files
