"""What a training step exchanges with the other ranks, found from the plan alone: nothing is allocated or sent.

So a job of a thousand ranks can be looked at on one machine before it is started. What is gathered when is decided by
the same `Gatherer` that trains; in place of the core and the other ranks stands a record of which units would be in
memory, by the rules of the core: the unit used longest ago goes first. Hooks' part is played here: forward gathers the
units in order, backward in reverse, and each trainable unit is reduced once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from zeroxide.config.sections.zeroxide import Zeroxide
from zeroxide.plan.plan import FRAME, Plan, UnitPlan, padded_sizes
from zeroxide.zero.gather.gatherer import Gatherer
from zeroxide.zero.passes import Home, UnitState

__all__ = ["Collective", "collectives", "sent_bytes"]

SETTLED = 2
"""Steps after which the order is known, and what is in memory is what every step leaves."""


@dataclass(frozen=True)
class Collective:
    """One collective of one rank. `sent` is the bytes that leave the rank for others."""

    phase: str
    kind: str
    unit: str
    sent: int


def collectives(plan: Plan, comm_dtype: torch.dtype, prefetch: int = Zeroxide.prefetch) -> Iterator[Collective]:
    """The collectives of a step of one micro-batch, in the order in which a rank begins them, when every module of the
    model runs once in forward, and without activation checkpointing, which changes nothing here.

    `comm_dtype` is the dtype in which gradients travel, `prefetch` the units gathered ahead, as in the config. Between
    ranks
    of one host that share memory there are none but the gathers of weights at home on disk.
    """
    if plan.world == 1:
        return
    rank = _Rank(plan, comm_dtype, prefetch)
    # What the steps before leave in memory, and their order, are part of the answer.
    for _ in range(SETTLED):
        rank.step()
    yield from rank.step()


def sent_bytes(plan: Plan, comm_dtype: torch.dtype, prefetch: int = Zeroxide.prefetch) -> int:
    """Bytes that leave a rank in such a step, what goes through shared memory included."""
    total = sum(each.sent for each in collectives(plan, comm_dtype, prefetch))
    if plan.world > 1 and plan.transport == "shared":
        numel = sum(padded(unit, plan.world) for unit in plan.units if unit.trainable)
        total += numel * comm_dtype.itemsize // plan.world * (plan.world - 1)
    return total


def padded(unit: UnitPlan, world: int) -> int:
    """Elements of a unit's flat layout over `world` ranks."""
    return padded_sizes(unit, world)[1]


class _Unit:
    """What a gatherer knows of a unit."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = UnitState.RELEASED

    def show(self) -> None:
        self.state = UnitState.GATHERED

    def hide(self) -> None:
        self.state = UnitState.RELEASED


class _Rank:
    """Plays one rank's steps: hooks to the gatherer on one side, core and exchange on the other."""

    def __init__(self, plan: Plan, comm_dtype: torch.dtype, prefetch: int) -> None:
        self.plan = plan
        self.comm_dtype = comm_dtype
        self.frames = _Frames(plan)
        self.begun: list[Collective] = []
        self.phase = "forward"
        self.held = [index for index, unit in enumerate(plan.units) if unit.held_through_backward]
        others = ((index, unit) for index, unit in enumerate(plan.units) if not unit.held_through_backward)
        # Units of the same modules take their turn together.
        turns = groupby(others, lambda each: list(map(id, each[1].modules)))
        self.groups = [[index for index, _ in group] for _, group in turns]
        # A gatherer asks of core and exchange what this class and `_Frames` answer, and of units what `_Unit` does.
        own: Any = self
        self.units: list[Any] = [_Unit(index) for index in range(len(plan.units))]
        core: Any = self.frames
        self.gatherer = Gatherer(
            core,
            own,
            self.units,
            prefetch,
            params_always_full=plan.params_always_full,
            home=plan.weights,
            world=plan.world,
        )

    def step(self) -> list[Collective]:
        """The collectives of one step."""
        self.begun = []
        plan = self.plan
        moves = plan.weights is not Home.HOST
        if moves:
            self._forward()
        self._backward(moves)
        self.frames.end_step()
        if plan.transport == "collective" and not moves and not plan.replicated:
            for index, unit in enumerate(plan.units):
                if unit.trainable:
                    self._all_gather("step", index)
        return self.begun

    def _forward(self) -> None:
        self.phase = "forward"
        self.gatherer.start_pass(True)
        for index in self.held:
            self.gatherer.gather(self.units[index])
        for group in self.groups:
            for index in group:
                self.gatherer.gather(self.units[index])
            for index in group:
                self.gatherer.release(self.units[index])

    def _backward(self, moves: bool) -> None:
        self.phase = "backward"
        held: list[int] = []
        for group in [self.held, *reversed(self.groups)]:
            if moves:
                for index in held:
                    self.gatherer.release(self.units[index])
                for index in group:
                    self.gatherer.gather(self.units[index])
            held = [] if group is self.held else group
            for index in held:
                if self.plan.units[index].trainable:
                    if moves:
                        self.gatherer.release(self.units[index])
                    self._reduce(index)
        if moves:
            self.gatherer.release_all()
        for index in reversed(self.held):
            if self.plan.units[index].trainable:
                self._reduce(index)

    # What the gatherer asks of an exchange --------------------------------------------------------------------------

    def gather(self, unit: _Unit) -> None:
        if not self.frames.hold(unit.index):
            self._all_gather(self.phase, unit.index)

    def gather_ahead(self, unit: _Unit) -> bool:
        if not self.frames.has_room(unit.index):
            return False
        self.gather(unit)
        return True

    def release(self, unit: _Unit) -> None:
        self.frames.release(unit.index)

    # What that costs ------------------------------------------------------------------------------------------------

    def _all_gather(self, phase: str, index: int) -> None:
        unit = self.plan.units[index]
        shard = padded(unit, self.plan.world) * self.plan.compute.itemsize // self.plan.world
        self.begun.append(Collective(phase, "all-gather", unit.name, shard * (self.plan.world - 1)))

    def _reduce(self, index: int) -> None:
        if self.plan.transport != "collective":
            return
        unit, world = self.plan.units[index], self.plan.world
        # Only what is trained has a gradient; other parameters of the unit's modules are a unit of their own.
        kept = padded_sizes(unit, world)[0] * self.comm_dtype.itemsize // (1 if self.plan.replicated else world)
        kind = "all-gather of gradients" if self.plan.replicated else "all-to-all"
        self.begun.append(Collective("backward", kind, unit.name, kept * (world - 1)))


class _Frames:
    """Which units are in memory, as the core would have it: those in use, and as many others as fit."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sizes = [-(-padded(unit, plan.world) * plan.compute.itemsize // FRAME) * FRAME for unit in plan.units]
        self._used: list[int] = []
        """The unit used longest ago first."""
        self._held: set[int] = set()
        self._all_shards_valid: set[int] = set()

    def end_step(self) -> None:
        """The other ranks' parts of what is trained have changed."""
        self._all_shards_valid = {index for index in self._all_shards_valid if not self._plan.units[index].trainable}

    def hold(self, index: int) -> bool:
        """Uses a unit; whether all of it was there. Afterwards it is."""
        if index not in self._used:
            self._make_room(index)
        self._touch(index)
        self._held.add(index)
        valid = index in self._all_shards_valid
        self._all_shards_valid.add(index)
        return valid

    def has_room(self, index: int) -> bool:
        """Whether the unit fits beside those in use."""
        return sum(self._sizes[each] for each in self._held | {index}) <= self._plan.gathered_bytes

    def release(self, index: int) -> None:
        """Ends the use of a unit. It stays until its frames are needed.

        Not so with weights from disk: how long they stay depends on the disk, and would differ by rank.
        """
        if index in self._held:
            self._held.discard(index)
            self._touch(index)
            if self._plan.weights is Home.DISK:
                self._all_shards_valid.discard(index)

    def prefetch(self, index: int) -> None:
        """Reads this rank's part of a unit, if units not in use leave it room."""
        if index not in self._used and self._make_room(index):
            self._touch(index)

    def _touch(self, index: int) -> None:
        if index in self._used:
            self._used.remove(index)
        self._used.append(index)

    def _make_room(self, index: int) -> bool:
        while sum(self._sizes[each] for each in self._used) + self._sizes[index] > self._plan.gathered_bytes:
            oldest = next((each for each in self._used if each not in self._held), None)
            if oldest is None:
                return False
            self._used.remove(oldest)
            self._all_shards_valid.discard(oldest)
        return True
