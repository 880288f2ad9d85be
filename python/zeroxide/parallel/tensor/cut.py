"""How a tensor is cut over tensor-parallel ranks: along one dimension, each rank keeps some ranges of indices.

A dimension may hold several tensors fused one behind the other, such as queries, keys and values. Each of these blocks
is cut alike, so that a rank has the same heads of all of them: its ranges are one for each block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch

from zeroxide.device.placement import HOST

__all__ = ["SHARD", "Range", "TensorShard", "cut_blocks", "shard_of"]

Range = tuple[int, int]
"""(first index, how many)."""

SHARD = "_tensor_shard"
"""The attribute of a parameter that is a part of a larger one, with its `TensorShard`."""


@dataclass(frozen=True)
class TensorShard:
    """What one tensor-parallel rank keeps of a tensor of `shape`: of dimension `dim`, `ranges[position]`."""

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[Range, ...], ...]
    """By rank of the group, ascending. Together they are every index once."""
    position: int

    @property
    def own(self) -> tuple[Range, ...]:
        """This rank's ranges."""
        return self.ranges[self.position]

    @property
    def length(self) -> int:
        """Indices that this rank keeps."""
        return sum(count for _, count in self.own)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return (*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """Elements of this rank's part."""
        return prod(self.local_shape)

    def at(self, position: int) -> TensorShard:
        """What another rank of the group keeps."""
        return TensorShard(self.shape, self.dim, self.ranges, position)

    def parts(self) -> Iterator[TensorShard]:
        """What each rank of the group keeps, in their order."""
        return map(self.at, range(len(self.ranges)))

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of `full`, which has `shape`: a view where the ranges are one, else a copy."""
        pieces = [full.narrow(self.dim, start, count) for start, count in self.own]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def put(self, full: torch.Tensor, part: torch.Tensor) -> None:
        """Writes this rank's `part` to its places in `full`, which has `shape`."""
        at = 0
        for start, count in self.own:
            full.narrow(self.dim, start, count).copy_(part.narrow(self.dim, at, count))
            at += count

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(place in the part, place in the tensor, how many) of elements `start .. start + count` of this rank's part,
        in order: those that lie in a row in both."""
        inner = prod(self.shape[self.dim + 1 :])
        at, end = start, start + count
        while at < end:
            outer, within = divmod(at, self.length * inner)
            index, rest = divmod(within, inner)
            for first, indices in self.own:
                if index < indices:
                    place = (outer * self.shape[self.dim] + first + index) * inner + rest
                    length = min(end - at, (indices - index) * inner - rest)
                    yield at, place, length
                    at += length
                    break
                index -= indices

    def places(self, start: int, count: int) -> torch.Tensor:
        """[count] int64: where in the tensor elements `start .. start + count` of this rank's part are; ascending."""
        inner = prod(self.shape[self.dim + 1 :])
        local = torch.arange(start, start + count, device=HOST)
        indices = torch.cat([torch.arange(first, first + number, device=HOST) for first, number in self.own])
        index = indices[local // inner % self.length]
        return (local // (inner * self.length) * self.shape[self.dim] + index) * inner + local % inner

    def find(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(which of `places` in the tensor are of this rank's part, where in the part those are)."""
        inner = prod(self.shape[self.dim + 1 :])
        index = places // inner % self.shape[self.dim]
        local, here, before = torch.zeros_like(index), torch.zeros_like(index, dtype=torch.bool), 0
        for first, number in self.own:
            inside = (index >= first) & (index < first + number)
            here |= inside
            local = torch.where(inside, index - first + before, local)
            before += number
        found = (places // (inner * self.shape[self.dim]) * self.length + local) * inner + places % inner
        return here, found[here]


def shard_of(param: torch.Tensor) -> TensorShard | None:
    """How the parameter is a part of a larger one; None where it is all of it."""
    found: TensorShard | None = param.__dict__.get(SHARD)
    return found


def cut_blocks(blocks: Sequence[int], groups: int, size: int) -> tuple[tuple[Range, ...], ...]:
    """The ranges of each of `size` ranks of a dimension that holds `blocks`, each of which is `groups` equal parts.

    Parts are dealt out in order, as evenly as they go: of 5 parts, 2 ranks get 2 and 3. `groups` divides every block
    and is at least `size`.
    """
    assert groups >= size, "every rank has a part"
    assert all(block % groups == 0 for block in blocks), "parts of a block are equal"
    bounds = [rank * groups // size for rank in range(size + 1)]
    found = []
    for first, end in pairwise(bounds):
        ranges: list[Range] = []
        at = 0
        for block in blocks:
            each = block // groups
            start, count = at + first * each, (end - first) * each
            if ranges and sum(ranges[-1]) == start:
                ranges[-1] = ranges[-1][0], ranges[-1][1] + count
            else:
                ranges.append((start, count))
            at += block
        found.append(tuple(ranges))
    return tuple(found)
