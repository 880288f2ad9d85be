"""How a tensor is cut over tensor ranks, and how one cut is made from another, against torch's own indexing."""

from __future__ import annotations

import itertools

import pytest
import torch

from zeroxide.checkpoint.format.manifest import Piece, SavedCut
from zeroxide.checkpoint.load import recut as module
from zeroxide.checkpoint.load.recut import recut
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
        flat = part.flatten()
        for start in range(0, shard.numel, 3):
            count = min(4, shard.numel - start)
            places = shard.places(start, count)
            assert torch.equal(full.flatten()[places], flat[start : start + count])
            runs = list(shard.runs(start, count))
            assert runs[0][0] == start
            found = [full.flatten()[place : place + number] for _, place, number in runs]
            assert torch.equal(torch.cat(found), flat[start : start + count])
        here, local = shard.find(torch.arange(full.numel()))
        assert torch.equal(full.flatten()[here], flat[local])
        assert here.sum() == shard.numel
    assert torch.equal(again, full)


def pieces_of(shard: TensorShard | None, numel: int, step: int) -> list[Piece]:
    cut = None
    if shard is not None:
        cut = SavedCut(shape=list(shard.shape), dim=shard.dim, ranges=[list(each) for each in shard.own])
    return [
        Piece(file="f", key="k", start=start, count=min(step, numel - start), dtype="F32", cut=cut)
        for start in range(0, numel, step)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("there", "here"), itertools.product([None, 2, 3], repeat=2))
@pytest.mark.parametrize("limits", [(1 << 18, 1 << 13, 1 << 20), (7, 2, 5)])
def test_one_cut_is_made_from_another(monkeypatch, shape, there, here, limits):
    """From uncut to cut, the other way, and from one number of ranks to another, in one read and in many.

    Catches: elements of a chunk that come from the chunk before, a read that ends with a piece, a gap that is not left
    out or is counted.
    """
    for name, value in zip(("CHUNK", "GAP", "SPAN"), limits, strict=True):
        monkeypatch.setattr(module, name, value)
    full = torch.rand(shape)
    sources = [None] if there is None else shards(shape, there, (6, 3, 3), 3)
    stored = {shard: (full if shard is None else shard.take(full)).flatten() for shard in sources}
    parts = [(shard, pieces_of(shard, stored[shard].numel(), 5)) for shard in sources]
    read = []

    def reader(pieces, start, count):
        values = stored[next(shard for shard, own in parts if own is pieces)]
        read.append(count)
        for piece in pieces:
            low, high = max(start, piece.start), min(start + count, piece.start + piece.count)
            if low < high:
                yield low, values[low:high]

    for shard in [None] if here is None else shards(shape, here):
        expected = (full if shard is None else shard.take(full)).flatten()
        for start, count in ((0, expected.numel()), (1, expected.numel() - 2)):
            found = []
            for at, values in recut(parts, start, count, shard, reader):
                assert at == start + sum(each.numel() for each in found)
                found.append(values.clone())
            assert torch.equal(torch.cat(found), expected[start : start + count])
    assert max(read) <= limits[2] + limits[1]
