"""How a tensor is cut over tensor-parallel ranks: along one dimension, each rank keeps some ranges of indices.

A dimension may hold several tensors fused one behind the other, such as queries, keys and values. Each of these blocks
is cut alike, so that a rank has the same heads of all of them: its ranges are one for each block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from zeroxide.params.part import Region

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

    @cached_property
    def region(self) -> Region:
        """This rank's part as checkpoints know it."""
        return Region(self.shape, self.dim, self.own)

    @property
    def length(self) -> int:
        """Indices that this rank keeps."""
        return self.region.length

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return self.region.part_shape()

    @property
    def numel(self) -> int:
        """Elements of this rank's part."""
        return self.region.numel

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
