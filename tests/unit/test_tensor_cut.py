"""How a tensor is cut over tensor ranks, against torch's own indexing."""

from __future__ import annotations

import pytest
import torch

from zeroxide.parallel.tensor import TensorShard
from zeroxide.parallel.tensor.cut import cut_blocks

SHAPES = [(12, 5), (5, 12), (3, 12, 2), (12,)]


def shards(shape: tuple[int, ...], size: int, blocks: tuple[int, ...] = (12,), groups: int = 6) -> list[TensorShard]:
    dim = shape.index(12)
    return list(TensorShard(shape, dim, cut_blocks(blocks, groups, size), 0).parts())


def indices_of(shard: TensorShard) -> torch.Tensor:
    return torch.cat([torch.arange(first, first + count) for first, count in shard.own])


def test_blocks_are_cut_alike():
    """Catches: fused weights cut as one, an uneven number dealt out with a hole."""
    assert cut_blocks((12,), 6, 3) == (((0, 4),), ((4, 4),), ((8, 4),))
    assert cut_blocks((6, 3, 3), 3, 2) == (((0, 2), (6, 1), (9, 1)), ((2, 4), (7, 2), (10, 2)))
    assert cut_blocks((5,), 5, 2) == (((0, 2),), ((2, 3),))
    # What lies side by side is one range.
    assert cut_blocks((4, 4), 4, 1) == (((0, 8),),)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("blocks", "groups", "size"), [((12,), 6, 4), ((6, 3, 3), 3, 2), ((4, 4, 4), 4, 3)])
def test_a_part_is_what_torchs_indexing_says(shape, blocks, groups, size):
    """Catches: a dimension that is off by one, ranges in the wrong order, elements that are counted along the wrong
    dimension."""
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    again = torch.zeros_like(full)
    for shard in shards(shape, size, blocks, groups):
        part = full.index_select(shard.dim, indices_of(shard))
        assert torch.equal(shard.take(full), part)
        assert shard.local_shape == part.shape
        assert shard.numel == part.numel()
        shard.put(again, part)
    assert torch.equal(again, full)
