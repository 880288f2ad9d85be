"""The micro-batches of a step, and whether all ranks have them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from zeroxide.device.placement import HOST, in_host, plain
from zeroxide.distributed import Ranks, Watch
from zeroxide.errors import DataError, RanksError

__all__ = ["CALLS", "Batches"]

CALLS = ("train_batch", "eval_batch")
NO_DIGEST = -1
"""Of a rank that takes no batches."""
MOST_DIGESTED = 1 << 20
"""Bytes of a tensor that its digest is of: two batches that are alike in so many are one."""


class Batches:
    """What a rank of a pipeline takes its micro-batches from.

    needed: whether this rank's stages take any. All ranks take the same number in each call, before anything runs: so
    data that ends, ends training on all of them.
    shared: what of a batch the ranks of one pipeline must have alike. pipelines: the ranks of each.
    """

    def __init__(
        self,
        world: Ranks,
        watch: Watch,
        device: torch.device,
        *,
        needed: bool,
        shared: Callable[[Any], Any],
        pipelines: Sequence[Sequence[int]],
    ) -> None:
        self._world = world
        self._watch = watch
        self._device = device
        self._needed = needed
        self._shared = shared
        self._pipelines = pipelines
        self.iterator: Iterator[Any] | None = None
        self.batch_fn: Callable[[Any], Any] | None = None

    def repeat(self, loader: Iterable[Any] | None) -> None:
        """Takes from a loader over and over, each pass with the next epoch of its sampler."""
        self.iterator = None if loader is None else _passes(loader)

    def take(self, call: str, count: int, step: int) -> list[Any]:
        """`count` micro-batches, on the device; as many None where none are needed. Every rank calls it.

        Raises StopIteration on all ranks where one's data ends before that, DataError on all where one has none, and
        RanksError where ranks ask for different things.
        """
        taken: list[Any] = []
        missing = self._needed and self.iterator is None
        while self._needed and not missing and len(taken) < count:
            assert self.iterator is not None
            try:
                taken.append(next(self.iterator))
            except StopIteration:
                break
        have = count if not self._needed else -1 if missing else len(taken)
        try:
            ready = [self._ready(each) for each in taken]
            digest = _digest([self._shared(each) for each in ready]) if self._needed and have == count else NO_DIGEST
        except Exception as error:
            # The others wait for this rank's count.
            self._watch.failed(f"{type(error).__name__}: {error}")
            raise
        self._agree(call, count, have, step, digest)
        return ready if self._needed else [None] * count

    def _agree(self, call: str, count: int, have: int, step: int, digest: int) -> None:
        rows = [[CALLS.index(call), count, have, digest]]
        if not self._world.alone:
            with self._watch.waiting("the batches of a step"):
                rows = self._world.gather_rows(torch.tensor(rows[0], device=HOST), "counting batches").tolist()
        for rank, row in enumerate(rows):
            if row[0] != rows[0][0]:
                raise RanksError(
                    f"rank {rank} called {CALLS[row[0]]} and rank 0 {CALLS[rows[0][0]]}: the ranks of a pipeline call "
                    "the same",
                    ranks=(rank,),
                )
            if row[1] != rows[0][1]:
                raise RanksError(
                    f"{call}: rank {rank} runs {row[1]} micro-batches and rank 0 {rows[0][1]}: call "
                    "engine.set_train_batch_size alike on every rank",
                    ranks=(rank,),
                )
        for rank, row in enumerate(rows):
            if row[2] < 0:
                raise DataError(
                    f"{call}: rank {rank} has no data: give data_iter, or call engine.set_dataiterator or "
                    "engine.set_dataloader there; its stages take batches"
                )
        short = min(range(len(rows)), key=lambda rank: rows[rank][2])
        left = rows[short][2]
        if left < count:
            over = f"{left} of {count} micro-batches were left over" if left else "no micro-batch was left"
            raise StopIteration(f"{call}: the data of rank {short} ended before step {step + 1}: {over}")
        for pipeline in self._pipelines:
            found = {rank: rows[rank][3] for rank in pipeline if rows[rank][3] != NO_DIGEST}
            odd = [rank for rank, each in found.items() if each != found[min(found)]]
            if odd:
                raise RanksError(
                    f"{call}: rank {odd[0]} has other samples than rank {min(found)} in step {step + 1}, and both have "
                    "stages of one pipeline: give them the same data in the same order",
                    ranks=(odd[0],),
                )

    def _ready(self, batch: Any) -> Any:
        return _moved(batch if self.batch_fn is None else self.batch_fn(batch), self._device)


def _passes(loader: Iterable[Any]) -> Iterator[Any]:
    epoch = 0
    while True:
        for name in ("sampler", "batch_sampler"):
            set_epoch = getattr(getattr(loader, name, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        some = False
        for batch in loader:
            some = True
            yield batch
        if not some:
            return
        epoch += 1


def _digest(value: Any) -> int:
    """A number that tells values apart: tensors by shape, dtype and bytes, containers by what is in them."""
    digest = 0
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            held = plain(in_host(each.detach())).contiguous().view(-1)
            held = held[: MOST_DIGESTED // max(1, held.itemsize)]
            digest = zlib.crc32(f"{tuple(each.shape)} {each.dtype}".encode(), digest)
            if held.numel():
                digest = zlib.crc32(held.view(torch.uint8).numpy().tobytes(), digest)
        elif isinstance(each, dict):
            left.extend(item for key in sorted(each, key=str) for item in (str(key), each[key]))
        elif isinstance(each, (tuple, list)):
            left.extend(each)
        elif each is None or isinstance(each, (bool, int, float, str)):
            digest = zlib.crc32(repr(each).encode(), digest)
    return digest


def _moved(value: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device; containers of other kinds stay as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(each, device) for each in value)
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: _moved(each, device) for key, each in value.items()}
    return value
