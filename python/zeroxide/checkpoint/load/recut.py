"""Elements of a tensor, or of one cut of it, from files that hold other cuts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from zeroxide.checkpoint.format.manifest import Piece
from zeroxide.device.placement import HOST
from zeroxide.parallel.tensor import TensorShard
from zeroxide.precision.bits import same_width

__all__ = ["recut"]

CHUNK = 1 << 18
"""Elements that are put together at once."""
GAP = 1 << 13
"""Elements between two that are wanted from which they are read one after the other: a read costs about as much."""
SPAN = 1 << 20
"""Elements that one read brings at the most."""

Read = Callable[[Sequence[Piece], int, int], Iterator[tuple[int, torch.Tensor]]]
"""(pieces of one part, first element, how many) -> chunks (first element, elements), in order."""


def recut(
    parts: Sequence[tuple[TensorShard | None, list[Piece]]],
    start: int,
    count: int,
    shard: TensorShard | None,
    read: Read,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first element, elements as stored) for elements `start .. start + count` of the tensor, or of its part `shard`.

    parts: what the files have, by the part of the tensor whose elements are counted; together all of it.
    """
    for at in range(start, start + count, CHUNK):
        number = min(CHUNK, start + count - at)
        places = torch.arange(at, at + number, device=HOST) if shard is None else shard.places(at, number)
        made: torch.Tensor | None = None
        for known, pieces in parts:
            if known is None:
                here, local = torch.ones_like(places, dtype=torch.bool), places
            else:
                here, local = known.find(places)
            targets = here.nonzero().view(-1)
            for first, end in _reads(local):
                wanted, into = local[first:end], targets[first:end]
                low, high = int(wanted[0]), int(wanted[-1])
                for begin, values in read(pieces, low, high - low + 1):
                    if made is None:
                        made = torch.empty(number, dtype=values.dtype, device=values.device)
                    lower = int(torch.searchsorted(wanted, begin))
                    upper = int(torch.searchsorted(wanted, begin + values.numel()))
                    found = same_width(values)[wanted[lower:upper] - begin]
                    same_width(made)[into[lower:upper]] = found
        assert made is not None, "the parts are all of the tensor"
        yield at, made


def _reads(local: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of an ascending list of elements that are read at once."""
    if not local.numel():
        return
    breaks = [*((local.diff() > GAP).nonzero().view(-1) + 1).tolist(), local.numel()]
    first = 0
    for end in breaks:
        while first < end:
            fits = int(torch.searchsorted(local, local[first] + SPAN))
            yield first, min(end, fits)
            first = min(end, fits)
