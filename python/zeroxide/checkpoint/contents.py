"""What a run holds, by name: parameters with their state in the core, buffers of the model, optimizer groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from zeroxide.parallel.tensor import shard_of
from zeroxide.params.part import Region, region_of
from zeroxide.rows import RowRange, rows_of
from zeroxide.zero.names import plain_name

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = [
    "WEIGHTS",
    "ElementRange",
    "ParamRecord",
    "own_pieces",
    "param_records",
    "persistent_buffers",
    "pieces_to_fill",
    "state_names",
    "value_dtype",
]

WEIGHTS = "weights"
"""The part of a parameter's state that every one has: the fp32 weight. The others are its optimizer's, by name."""


@dataclass(frozen=True)
class ParamRecord:
    """One parameter of an engine. `names` has every name that the model gives it, the first one first."""

    unit: int
    position: int
    offset: int
    """Of its first element in the unit's flat weights, in elements."""
    names: tuple[str, ...]
    shape: tuple[int, ...]
    numel: int
    trainable: bool
    dtype: torch.dtype
    """What its weights are saved as: fp32, or for a frozen parameter the dtype that it has."""
    opaque: bool
    group: int | None
    """Number of its optimizer group; None if it is frozen."""
    states: Mapping[str, float]
    """The state tensors that its optimizer keeps, with what they start from; none if it is frozen."""
    region: Region | None = None
    """Which elements of the undivided model's parameter this is; None for all of them."""
    rows: RowRange | None = None
    """Which rows of a parameter of the model this is, where that is cut by rows; None for all of them."""

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the undivided model's parameter."""
        if self.rows is not None:
            return self.rows.shape
        return self.shape if self.region is None else self.region.shape

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of the parameter whose elements files have by number: the model's, of these ranks' part of it."""
        return self.shape if self.rows is None else self.rows.shape

    @property
    def first(self) -> int:
        """The number there of its first element."""
        return 0 if self.rows is None else self.rows.start

    @property
    def elements(self) -> str:
        """Which elements of which parameter of the undivided model this is."""
        return self.name if self.region is None else f"{self.name}[{self.region.dim}:{self.region.segments}]"

    def has(self, part: str) -> bool:
        """Whether the parameter has that part: the weights, or a state tensor of its optimizer."""
        return part == WEIGHTS or part in self.states


def value_dtype(held: ParamRecord, part: str) -> torch.dtype:
    """The dtype in which the values of a part are given to the core and kept in files."""
    return held.dtype if part == "weights" else torch.float32


def param_records(training: TrainingState) -> list[ParamRecord]:
    """Every parameter once, in the order of the core."""
    core = training.core
    names: dict[int, list[str]] = {}
    for name, param in training.module.named_parameters(remove_duplicate=False):
        known = names.setdefault(id(param), [])
        # A module that is there compiled and as it was has one name for both.
        if (plain := plain_name(name)) not in known:
            known.append(plain)
    grouped = [] if training.optimizer is None else training.optimizer.param_groups
    groups = {id(param): number for number, group in enumerate(grouped) for param in group["params"]}
    return [
        ParamRecord(
            unit=unit.index,
            position=position,
            offset=core.param_offset(unit.index, position),
            names=tuple(names[id(param)]),
            shape=tuple(unit.shapes[position]),
            numel=unit.shapes[position].numel(),
            trainable=unit.trainable[position],
            dtype=torch.float32 if unit.trainable[position] else unit.dtypes[position],
            opaque=unit.opaque[position],
            group=groups.get(id(param)),
            states=unit.states if unit.trainable[position] else {},
            region=_region(param),
            rows=rows_of(param),
        )
        for unit in training.units
        for position, param in enumerate(unit.params)
    ]


def _region(param: nn.Parameter) -> Region | None:
    shard = shard_of(param)
    return region_of(param) if shard is None else shard.region


def state_names(held: Iterable[ParamRecord]) -> list[str]:
    """The names of all state tensors that optimizers keep of these parameters, each once, in their order."""
    return list(dict.fromkeys(name for one in held for name in one.states))


@dataclass(frozen=True)
class ElementRange:
    """Elements `start .. start + count` of a parameter."""

    held: ParamRecord
    start: int
    count: int


def own_pieces(training: TrainingState, records: Sequence[ParamRecord]) -> list[ElementRange]:
    """What this rank saves of its parameters' `records`, in the order of the core: over all ranks, every element of
    every parameter once."""
    return _runs(training, records, training.core.pieces)


def _runs(
    training: TrainingState, records: Sequence[ParamRecord], pieces: Callable[[int], list[tuple[int, int, int]]]
) -> list[ElementRange]:
    word = training.compute.itemsize
    held = {(each.unit, each.position): each for each in records}
    return [
        _run(held[unit.index, position], start, count, word)
        for unit in training.units
        for position, start, count in pieces(unit.index)
    ]


def _run(held: ParamRecord, start: int, count: int, word: int) -> ElementRange:
    """Elements of a parameter from its words; a shard starts with a whole element of any dtype."""
    if held.trainable:
        return ElementRange(held, start, count)
    first, size = start * word // held.dtype.itemsize, held.dtype.itemsize
    return ElementRange(held, first, min(count * word // size, held.numel - first))


def pieces_to_fill(training: TrainingState, records: Sequence[ParamRecord], part: str) -> list[ElementRange]:
    """What this rank must be given of a part when state is loaded: everything of what every rank keeps, else its shard.

    Every rank keeps the weights up to stage 2, and the moments at stage 0. A shard is what this rank saves and what the
    other replicas of it save.
    """
    if training.keeps_whole(part):
        return [ElementRange(held, 0, held.numel) for held in records]
    return _runs(training, records, training.core.kept_pieces)


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are part of the model's state, each once, under its first name."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is None or name in owner._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            found[plain_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found
