"""Tensors that ranks had parts of: which elements a region has, and loading any of them from pieces of any others."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.format.cutting import Cut, Tensor
from zeroxide.checkpoint.format.manifest import Manifest, Piece, SavedFile, SavedParameter, SavedRegion
from zeroxide.checkpoint.format.stream import StreamWriter, read_scattered
from zeroxide.checkpoint.live_state import Staging
from zeroxide.checkpoint.load import source
from zeroxide.checkpoint.load.open_files import MOST_OPEN, OpenFiles
from zeroxide.checkpoint.load.scatter import GAP_BYTES
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


ROWS, COLUMNS = 2100, 6
"""More rows than one call has places (1,024)."""


def counted(monkeypatch) -> dict[str, int]:
    """Calls that open and read files from now on."""
    calls = {"open": 0, "preadv": 0}
    for name in calls:
        act = getattr(os, name)

        def counting(*args, name=name, act=act):
            calls[name] += 1
            return act(*args)

        monkeypatch.setattr(os, name, counting)
    return calls


@pytest.mark.parametrize("into", ["all", "columns"])
@pytest.mark.parametrize("cut", ["columns", "none"])
def test_rows_that_lie_together_are_read_in_one_call(cut, into, tmp_path, monkeypatch):
    """A call and an open file for each row would be 4,200 of both for what is cut by columns and loaded undivided, and
    2,100 for columns of what is undivided. A call has 1,024 places, a gap takes one. Catches: a file opened for each
    row, a call for each row, a call that ends at every gap."""
    shape = (ROWS, COLUMNS)
    regions = [((0, 2),), ((2, 4),)] if cut == "columns" else [((0, COLUMNS),)]
    pieces, files = saved(tmp_path, shape, 1, regions, 0)
    sources = Sources(tmp_path, files, pieces, Staging(), Team(None))
    region = None if into == "all" else Region(shape, 1, ((1, 3),))
    expected = (torch.arange(ROWS * COLUMNS) if region is None else elements(region)).float()
    list(sources.chunks(pieces, 0, 1, shape))  # Headers are read once.
    sources.close()
    calls = counted(monkeypatch)
    ((at, found),) = sources.chunks(pieces, 0, len(expected), shape, region)
    monkeypatch.undo()
    assert (at, torch.equal(found, expected)) == (0, True)
    assert calls["open"] == len(files)
    tensors = len(pieces)
    assert calls["preadv"] <= tensors + (2 if into == "columns" else 1) * len(files) * ROWS / 1022
    # They stay open for the next tensor.
    calls = counted(monkeypatch)
    list(sources.chunks(pieces, 0, len(expected), shape, region))
    assert calls["open"] == 0
    monkeypatch.undo()
    sources.close()
    assert not sources._kept_open._descriptors


def test_a_gap_that_is_large_is_not_read(tmp_path, monkeypatch):
    """Catches: all of a tensor read for a column of it."""
    shape = (3, GAP_BYTES // 4 + 2)
    pieces, files = saved(tmp_path, shape, 1, [((0, shape[1]),)], 0)
    sources = Sources(tmp_path, files, pieces[:], Staging(), Team(None))
    seen = []
    act = source.read_scattered
    monkeypatch.setattr(source, "read_scattered", lambda *args: seen.append(act(*args)) or seen[-1])
    for width, most in ((1, 4), (2, 4 * (shape[1] * 2 + 2))):
        region = Region(shape, 1, ((0, width),))
        seen.clear()
        ((_, found),) = sources.chunks(pieces, 0, 3 * width, shape, region)
        assert torch.equal(found, elements(region).float())
        # A gap of GAP_BYTES is read over, and one of an element more is not.
        assert max(seen) <= most
        assert sum(seen) == 12 if width == 1 else sum(seen) > 24


def test_few_files_are_open_at_once(tmp_path):
    """Catches: a descriptor for each of the ranks that saved, the one closed that was used last."""
    paths = [tmp_path / f"{number}" for number in range(MOST_OPEN + 3)]
    for path in paths:
        path.write_text(path.name)
    files, before = OpenFiles(), len(os.listdir("/proc/self/fd"))
    for path in paths:
        files.descriptor(path)
    assert list(files._descriptors) == paths[-MOST_OPEN:]
    for path in [*paths, *paths, paths[-1], paths[0]]:
        assert os.pread(files.descriptor(path), 9, 0).decode() == path.name
        assert len(os.listdir("/proc/self/fd")) <= before + MOST_OPEN
    files.close()
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_read_that_is_cut_short_goes_on_where_it_was(tmp_path, monkeypatch):
    """Whatever a call reads of what it was asked for. Catches: a place that is begun again, or left out."""
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    act = os.preadv
    for most in (1, 7, 30):
        with path.open("rb") as file, monkeypatch.context() as patched:
            patched.setattr(os, "preadv", lambda fd, into, at, most=most: act(fd, short(into, most), at))
            places = [memoryview(bytearray(size)) for size in (3, 0, 10, 1, 50)]
            assert read_scattered(file.fileno(), places, 5) == 64
            assert b"".join(places) == bytes(range(5, 69))
            assert read_scattered(file.fileno(), [memoryview(bytearray(60))], 50) == 50


def short(into, most):
    """The first bytes of places."""
    found = []
    for each in into:
        found.append(each[:most])
        most -= found[-1].nbytes
        if not most:
            break
    return found


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
