"""The values of what a run holds, out of its core a chunk at a time, and the memory that they pass through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from zeroxide import _core
from zeroxide.checkpoint.contents import ParamRecord
from zeroxide.device.placement import HOST, spec
from zeroxide.precision.bits import ORDINARY, round_into

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["CHUNK_ELEMENTS", "LiveState", "Staging"]

CHUNK_ELEMENTS = 1 << 20


class Staging:
    """The memory that all state passes through on its way to and from files: one chunk as fp32, one as stored."""

    def __init__(self, elements: int = CHUNK_ELEMENTS) -> None:
        self.elements = elements
        self.values = torch.empty(elements, dtype=torch.float32, device=HOST)
        self._raw = torch.empty(elements * 4, dtype=torch.uint8, device=HOST)

    def stored(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Room for up to `count` elements as they stand in a file; for fp32 it is the memory of `values`."""
        if dtype == torch.float32:
            return self.values[:count]
        count = min(count, self._raw.numel() // dtype.itemsize)
        return self._raw[: count * dtype.itemsize].view(dtype)


class LiveState:
    """Reads the state of parameters out of the core, a chunk at a time, into reused memory.

    source: what it is read from instead, where that is not the state as it is now.
    """

    def __init__(self, training: TrainingState, staging: Staging, source: _core.CommittedReads | None = None) -> None:
        self._core = training.core if source is None else source
        self._staging = staging
        self._word = training.compute.itemsize
        """Bytes of an element of the compute dtype, in which frozen parameters are laid out."""
        # State on disk comes in whole tiles; a chunk that ends where a tile ends reads none of them twice.
        self._step = max(1, staging.elements // training.tile_elements) * training.tile_elements
        self._step = min(self._step, staging.elements)

    def chunks(
        self, held: ParamRecord, part: str, start: int, count: int, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """Elements `start .. start + count` as fp32 or, rounded as the live weights are, as bf16 or fp16; of frozen
        weights as they are, in their own dtype.

        Each chunk is valid until the next one is taken.
        """
        if part == "weights" and not held.trainable:
            assert dtype == held.dtype, f"{held.name} is {held.dtype}"
            yield from self._raw_chunks(held, start, count)
            return
        end = start + count
        while start < end:
            boundary = (held.offset + start) // self._step * self._step + self._step - held.offset
            length = min(end, boundary) - start
            values = self._staging.values[:length]
            stored = self._staging.stored(dtype, length)
            if dtype == torch.float32:
                values = stored
            self._core.read_param(held.unit, held.position, part, start, spec(values))
            start += length
            assert dtype in ORDINARY, "live state is fp32, bf16 or fp16"
            round_into(values, stored)
            yield stored

    def _raw_chunks(self, held: ParamRecord, start: int, count: int) -> Iterator[torch.Tensor]:
        size = held.dtype.itemsize
        at, end = start * size, (start + count) * size
        # Whole elements of any dtype: parameters start at multiples of 128 bytes, too.
        offset, step = held.offset * self._word, max(1, self._step * self._word // 128) * 128
        while at < end:
            length = min(end, (offset + at) // step * step + step - offset) - at
            stored = self._staging.stored(held.dtype, length // size)
            self._core.read_bytes(held.unit, held.position, at, spec(stored.view(torch.uint8)))
            at += stored.numel() * size
            yield stored
