"""Where the elements of a tensor are in the pieces that were saved of it, when ranks had parts of the tensor."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from zeroxide.checkpoint.format.manifest import Piece
from zeroxide.params.part import Region

__all__ = ["PieceMap"]


class PieceMap:
    """The pieces of one tensor, found by elements of the tensor."""

    def __init__(self, pieces: Sequence[Piece], shape: Sequence[int]) -> None:
        self._regions: list[tuple[Region | None, list[Piece]]] = []
        for piece in pieces:
            region = None if piece.region is None else piece.region.within(shape)
            if not self._regions or self._regions[-1][0] != region:
                self._regions.append((region, []))
            self._regions[-1][1].append(piece)
        self._places = sorted(
            (start, start + length, number, before)
            for number, (region, _) in enumerate(self._regions)
            if region is not None
            for (start, length), before in _with_places(region)
            if length
        )
        """(start, end) along the dimension that is divided, of which region, and where in a row of that region."""

    def of_region(self, region: Region | None, start: int, count: int) -> Iterator[tuple[int, Piece, int, int]]:
        """As `find`, for elements of a region, by their numbers there; of the tensor, where it is None."""
        for own, first, most in ((start, start, count),) if region is None else region.runs(start, count):
            for at, piece, inside, left in self.find(first, most):
                yield own + at - first, piece, inside, left

    def find(self, start: int, count: int) -> Iterator[tuple[int, Piece, int, int]]:
        """(element, piece, element of the piece, elements) for the tensor's elements `start .. start + count`, in
        order."""
        region, pieces = self._regions[0]
        if region is None:
            yield from _among(pieces, start, count, start)
            return
        full, end = region.shape[region.dim] * region.inner, start + count
        while start < end:
            outer, inside = divmod(start, full)
            place, rest = divmod(inside, region.inner)
            at = bisect.bisect_right(self._places, (place, float("inf"))) - 1
            first, last, number, before = self._places[at]
            mine, pieces = self._regions[number]
            assert mine is not None, "a tensor is divided, or it is not"
            take = min((last - place) * region.inner - rest, end - start)
            local = (outer * mine.length + before + place - first) * region.inner + rest
            yield from _among(pieces, local, take, start)
            start += take


def _with_places(region: Region) -> Iterator[tuple[tuple[int, int], int]]:
    before = 0
    for segment in region.segments:
        yield segment, before
        before += segment[1]


def _among(pieces: Sequence[Piece], start: int, count: int, first: int) -> Iterator[tuple[int, Piece, int, int]]:
    """As `find`, in the region of `pieces`, of which element `start` is the tensor's `first`."""
    for piece in pieces:
        at = max(start, piece.start)
        end = min(start + count, piece.start + piece.count)
        if at < end:
            yield first + at - start, piece, at - piece.start, end - at
