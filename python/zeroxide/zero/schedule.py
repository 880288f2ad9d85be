"""What a training step exchanges with the other ranks, found from the plan alone: nothing is allocated or sent.

So a job of a thousand ranks can be looked at on one machine before it is started. The rules are those of `Hooks`,
`CollectiveExchange` and the core's gathering: forward gathers the units in order, backward in reverse; a unit stays in
memory until a later one needs its frames, the one used longest ago first; each trainable unit is reduced once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from zeroxide.zero.plan import FRAME, Plan, UnitPlan, padded_sizes
from zeroxide.zero.state import Home

__all__ = ["Collective", "collectives", "sent_bytes"]


@dataclass(frozen=True)
class Collective:
    """One collective of one rank. `sent` is the bytes that leave the rank for others."""

    phase: str
    kind: str
    unit: str
    sent: int


def collectives(plan: Plan, wire: torch.dtype) -> Iterator[Collective]:
    """The collectives of a step of one micro-batch, in the order in which a rank runs them, when every module of the
    model runs once in forward, and without activation checkpointing, which changes nothing here.

    `wire` is the dtype in which gradients travel. Between ranks of one host that share memory there are none but the
    gathers of weights at home on disk.
    """
    if plan.world == 1:
        return
    frames = _Frames(plan)
    # What the step before leaves in memory is part of the answer: weights that no step changes stay valid.
    for _ in _one_step(plan, wire, frames):
        pass
    frames.end_step()
    yield from _one_step(plan, wire, frames)


def _one_step(plan: Plan, wire: torch.dtype, frames: _Frames) -> Iterator[Collective]:
    units = plan.units
    spans = [index for index, unit in enumerate(units) if unit.span]
    groups = [
        [index for index, _ in group]
        for _, group in groupby(
            ((index, unit) for index, unit in enumerate(units) if not unit.span),
            lambda each: list(map(id, each[1].modules)),
        )
    ]
    moves = plan.weights is not Home.HOST
    turns = [("forward", spans), *(("forward", group) for group in groups)]
    turns += [("backward", group) for group in reversed(groups)]
    sequence = [index for _, group in turns for index in group]
    at = 0
    for phase, group in turns:
        for index in group:
            at += 1
            if moves and not frames.hold(index, group):
                yield _all_gather(plan, phase, index)
            if plan.weights is Home.DISK and at < len(sequence):
                frames.prefetch(sequence[at], group)
        for index in group if phase == "backward" else ():
            if units[index].trainable and plan.wire == "collective":
                yield _reduce(plan, index, wire)
    for index in spans:
        if units[index].trainable and plan.wire == "collective":
            yield _reduce(plan, index, wire)
    if plan.wire == "collective" and not moves and not plan.replicated:
        for index, unit in enumerate(units):
            if unit.trainable:
                yield _all_gather(plan, "step", index)


def sent_bytes(plan: Plan, wire: torch.dtype) -> int:
    """Bytes that leave a rank in such a step, what goes through shared memory included."""
    total = sum(each.sent for each in collectives(plan, wire))
    if plan.world > 1 and plan.wire == "shared":
        numel = sum(padded(unit, plan.world) for unit in plan.units if unit.trainable)
        total += numel * wire.itemsize // plan.world * (plan.world - 1)
    return total


def padded(unit: UnitPlan, world: int) -> int:
    """Elements of a unit's flat layout over `world` ranks."""
    return padded_sizes(unit, world)[1]


def _all_gather(plan: Plan, phase: str, index: int) -> Collective:
    unit = plan.units[index]
    shard = padded(unit, plan.world) * plan.compute.itemsize // plan.world
    return Collective(phase, "all-gather", unit.name, shard * (plan.world - 1))


def _reduce(plan: Plan, index: int, wire: torch.dtype) -> Collective:
    unit = plan.units[index]
    whole = padded(unit, plan.world) * wire.itemsize
    if plan.replicated:
        return Collective("backward", "all-gather of gradients", unit.name, whole * (plan.world - 1))
    return Collective("backward", "all-to-all", unit.name, whole // plan.world * (plan.world - 1))


class _Frames:
    """Which units' weights are in memory: those in use, and as many others as fit, the last used first."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sizes = [-(-padded(unit, plan.world) * plan.compute.itemsize // FRAME) * FRAME for unit in plan.units]
        self._used: list[int] = []
        self._valid: set[int] = set()

    def end_step(self) -> None:
        """The other ranks' parts of what is trained have changed."""
        self._valid = {index for index in self._valid if not self._plan.units[index].trainable}

    def hold(self, index: int, pinned: list[int]) -> bool:
        """Uses a unit, together with those `pinned`; whether it was still there and valid.

        Weights that come from disk never are: how long their frames stay depends on the disk, and would differ by rank.
        """
        there = index in self._valid and self._plan.weights is not Home.DISK
        if index in self._used:
            self._used.remove(index)
        self._make_room(index, pinned)
        self._used.append(index)
        self._valid.add(index)
        return there

    def prefetch(self, index: int, pinned: list[int]) -> None:
        """Takes frames for the unit that comes next, if units not in use have enough of them."""
        if index not in self._used and self._make_room(index, pinned):
            self._used.append(index)

    def _make_room(self, index: int, pinned: list[int]) -> bool:
        def lacking() -> bool:
            taken = sum(self._sizes[each] for each in self._used) + self._sizes[index]
            return taken > self._plan.gathered_bytes

        units = self._plan.units
        while lacking():
            oldest = next((each for each in self._used if not units[each].span and each not in pinned), None)
            if oldest is None:
                return False
            self._used.remove(oldest)
            self._valid.discard(oldest)
        return True
