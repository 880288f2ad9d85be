"""Tensors that ranks had parts of: which elements a region has, and loading any of them from pieces of any others."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.format.cutting import Cut, Tensor
from zeroxide.checkpoint.format.manifest import Manifest, Piece, SavedFile, SavedParameter, SavedRegion
from zeroxide.checkpoint.format.stream import StreamWriter
from zeroxide.checkpoint.live_state import Staging
from zeroxide.checkpoint.load.source import Sources
from zeroxide.params.part import Region

SHAPES = [((12,), 0), ((6, 4), 0), ((6, 4), 1), ((2, 9, 5), 1), ((3, 2, 8), 2), ((1, 7), 0), ((5, 0), 0)]


def divided(size: int, ranks: int, seed: int) -> list[tuple[tuple[int, int], ...]]:
    """Segments of `ranks` regions that are all of `size` places together: a few each, as of a fused projection."""
    draw = random.Random(seed)
    cuts = sorted({0, size, *(draw.randint(0, size) for _ in range(2 * ranks))})
    found: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for number, (start, end) in enumerate(pairwise(cuts)):
        found[number % ranks].append((start, end - start))
    return [tuple(each) or ((0, 0),) for each in found]


def elements(region: Region) -> torch.Tensor:
    """Numbers of the region's elements in the tensor, by indexing."""
    places = [place for start, length in region.segments for place in range(start, start + length)]
    numbers = torch.arange(torch.Size(region.shape).numel()).view(region.shape)
    return numbers.index_select(region.dim, torch.tensor(places, dtype=torch.int64)).flatten()


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_runs_are_the_elements_of_a_region(shape, dim, seed):
    """Catches: a segment's own elements after the wrong ones of a row, a run over the end of a segment or a row."""
    for segments in divided(shape[dim], 3, seed):
        region = Region(shape, dim, segments)
        expected = elements(region)
        assert region.numel == expected.numel()
        assert torch.Size(region.part_shape()).numel() == expected.numel()
        for start, count in ((0, region.numel), (1, max(0, region.numel - 2)), (region.numel // 2, region.numel // 3)):
            found = [(own + at, first + at) for own, first, n in region.runs(start, count) for at in range(n)]
            assert [own for own, _ in found] == list(range(start, start + count))
            assert [first for _, first in found] == expected[start : start + count].tolist()


def saved(folder: Path, shape, dim, regions, seed) -> tuple[list[Piece], list[SavedFile]]:
    """What ranks with these regions save of a tensor whose elements are their own numbers: a file and pieces each."""
    draw, pieces, files = random.Random(seed), [], []
    for rank, segments in enumerate(regions):
        region = Region(shape, dim, segments)
        values = elements(region).float()
        cuts = sorted({0, region.numel, draw.randint(0, region.numel)})
        ranges = list(pairwise(cuts)) or [(0, 0)]
        name = f"weights-rank{rank}.safetensors"
        tensor = Tensor("w", torch.float32, region.part_shape())
        entries = [Cut(tensor, start, end - start).entry for start, end in ranges]
        with StreamWriter(folder / name, entries, {}) as writer:
            for start, end in ranges:
                writer.write(values[start:end])
            checksum = writer.finish()
        files.append(SavedFile(name=name, bytes=writer.bytes, crc64nvme=checksum))
        where = SavedRegion(dim=dim, segments=[list(each) for each in segments])
        pieces += [
            Piece(file=name, key=entry.key, start=start, count=end - start, dtype="F32", region=where)
            for entry, (start, end) in zip(entries, ranges, strict=True)
        ]
    return pieces, files


@pytest.mark.parametrize(("shape", "dim"), SHAPES[:-1])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_any_region_is_read_from_any_regions(shape, dim, ranks, seed, tmp_path):
    """Also across dimensions, and in chunks smaller than a run. Catches: elements of another place of the row, a chunk
    that ends with a run, a piece of another region."""
    pieces, files = saved(tmp_path, shape, dim, divided(shape[dim], ranks, seed), seed)
    sources = Sources(tmp_path, files, pieces, Staging(5), Team(None))
    numel = torch.Size(shape).numel()
    wanted = [None]
    for other in range(len(shape)):
        wanted += [Region(shape, other, segments) for segments in divided(shape[other], 2, seed + 7)]
    for region in wanted:
        expected = torch.arange(numel) if region is None else elements(region)
        for start, count in ((0, expected.numel()), (2, max(0, expected.numel() - 3))):
            chunks = [(at, each.clone()) for at, each in sources.chunks(pieces, start, count, shape, region)]
            assert [at for at, _ in chunks] == list(range(start, start + count, 5))
            found = torch.cat([torch.empty(0), *(each for _, each in chunks)])
            assert torch.equal(found, expected[start : start + count].float())


def manifest(pieces: list[Piece]) -> Manifest:
    names = dict.fromkeys(piece.file for piece in pieces)
    return Manifest(
        zeroxide="0",
        precision="bf16",
        state_format="split",
        counters={"global_steps": 0, "global_samples": 0, "micro_steps": 0, "skipped_steps": 0},
        groups=[],
        scheduler=None,
        generators=[],
        client_state={},
        parameters=[
            SavedParameter(names=["w"], shape=[4, 6], trainable=True, updates=0, group=0, weights=pieces, state={})
        ],
        buffers=[],
        files=[SavedFile(name=name, bytes=0, crc64nvme="") for name in names],
    )


def piece(count: int, dim: int | None, *segments: list[int], start: int = 0) -> Piece:
    region = None if dim is None else SavedRegion(dim=dim, segments=list(segments))
    return Piece(file="f", key="w", start=start, count=count, dtype="F32", region=region)


WHOLE = [
    [piece(24, None)],
    [piece(8, 1, [0, 2]), piece(16, 1, [2, 4])],
    [piece(12, 1, [0, 1], [4, 2]), piece(4, 1, [1, 3]), piece(8, 1, [1, 3], start=4)],
    [piece(6, 0, [3, 1]), piece(18, 0, [0, 3])],
]
BROKEN = [
    [piece(23, None)],
    [piece(8, 1, [0, 2])],
    [piece(8, 1, [0, 2]), piece(16, 1, [1, 4])],
    [piece(8, 1, [0, 2]), piece(15, 1, [2, 4])],
    [piece(8, 1, [0, 2]), piece(12, 1, [3, 3])],
    [piece(8, 1, [0, 2]), piece(18, 0, [1, 3])],
    [piece(12, 0, [0, 2]), piece(24, None)],
    [piece(12, 0, [0, 2]), piece(12, 0, [3, 2])],
    [piece(24, 2, [0, 1])],
]


@pytest.mark.parametrize("pieces", WHOLE)
def test_regions_that_are_all_of_a_tensor_are_complete(pieces):
    manifest(pieces).check()


@pytest.mark.parametrize("pieces", BROKEN)
def test_holes_and_overlaps_of_regions_are_found(pieces):
    """Catches: a hole in a region, between regions, regions that overlap, of two dimensions, or outside the tensor."""
    with pytest.raises(ValueError, match=r"not complete|not inside|no dimension"):
        manifest(pieces).check()


def test_regions_are_written_where_there_are_some():
    assert "region" not in manifest(WHOLE[0]).text()
    assert "region" in manifest(WHOLE[1]).text()
