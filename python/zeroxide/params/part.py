"""What a parameter is of the undivided model, where ranks have parts of its tensors."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

from torch import nn

__all__ = ["Region", "mark_part", "region_of"]

_ATTRIBUTE = "_region"


@dataclass(frozen=True)
class Region:
    """Some of a tensor of `shape`: along `dim` the elements of `segments`, each (start, length), one after the other.

    A column of a weight is one segment; a rank's heads of a fused query, key and value are three. Elements of a region
    are numbered as those of a contiguous tensor that has them alone.
    """

    shape: tuple[int, ...]
    dim: int
    segments: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        size = self.shape[self.dim]
        if self.dim < 0 or not all(
            start >= 0 and length >= 0 and start + length <= size for start, length in self.segments
        ):
            raise ValueError(f"segments {self.segments} are not inside dimension {self.dim} of {self.shape}")

    @cached_property
    def inner(self) -> int:
        """Elements of the tensor that follow one another at one place along `dim`."""
        return prod(self.shape[self.dim + 1 :])

    @cached_property
    def length(self) -> int:
        """Places along `dim`."""
        return sum(length for _, length in self.segments)

    @cached_property
    def _begins(self) -> list[int]:
        """Where each segment begins in a row of the region, in elements."""
        lengths = (length * self.inner for _, length in self.segments)
        return list(accumulate(lengths, initial=0))

    @property
    def numel(self) -> int:
        """Elements of the region."""
        return prod(self.shape[: self.dim]) * self.length * self.inner

    def part_shape(self) -> tuple[int, ...]:
        """The shape of a tensor that has the region alone."""
        return (*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :])

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(element of the region, element of the tensor, elements that follow one another in both) for the region's
        elements `start .. start + count`, in order."""
        row, full = self.length * self.inner, self.shape[self.dim] * self.inner
        end = start + count
        while start < end:
            outer, place = divmod(start, row)
            # Empty segments begin where the next one does: the last of those that begin here has elements.
            number = bisect.bisect_right(self._begins, place) - 1
            first, length = self.segments[number]
            inside = place - self._begins[number]
            take = min(length * self.inner - inside, end - start)
            yield start, outer * full + first * self.inner + inside, take
            start += take


def mark_part(param: nn.Parameter, region: Region) -> None:
    """Says which elements of the undivided model's parameter this one is. Copies of a model keep it."""
    setattr(param, _ATTRIBUTE, region)


def region_of(param: nn.Parameter) -> Region | None:
    """Which elements of the undivided model's parameter this is, as `mark_part` was told; None for all of them."""
    found = getattr(param, _ATTRIBUTE, None)
    return found if isinstance(found, Region) else None
