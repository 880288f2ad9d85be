"""Which samples of a data set are this rank's, in the loader that `initialize` returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler, IterableDataset

__all__ = ["EpochSampler", "ShardedIterable"]


class EpochSampler(DistributedSampler[Any]):
    """torch's sampler, whose every pass is an epoch of its own: one more than the last.

    `set_epoch` chooses the epoch of the next pass, as a script does that goes on from a checkpoint.
    """

    _passed = False

    def set_epoch(self, epoch: int) -> None:
        """See torch; later passes count on from there."""
        super().set_epoch(epoch)
        self._passed = False

    def __iter__(self) -> Iterator[Any]:
        if self._passed:
            self.epoch += 1
        self._passed = True
        return super().__iter__()


class ShardedIterable(IterableDataset[Any]):
    """Of every `world` items of `data` in a row the one that is rank `rank`'s; all ranks have the same items.

    What is left over at the end, fewer items than ranks, is left out: all ranks get equally many. Where workers load
    the data, each of them shares what it gets.
    """

    def __init__(self, data: Any, rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world

    def __len__(self) -> int:
        """Raises TypeError where the data set has no length."""
        return len(self.data) // self.world

    def __iter__(self) -> Iterator[Any]:
        mine: Any = None
        for number, item in enumerate(self.data):
            place = number % self.world
            if place == self.rank:
                mine = item
            if place == self.world - 1:
                yield mine
