"""What a training step exchanges with the other ranks, found from the plan alone: nothing is allocated or sent.

So a job of a thousand ranks can be looked at on one machine before it is started. The rules are those of `Hooks`,
`CollectiveExchange` and the core's gathering: forward gathers the units in order, backward in reverse; a unit stays in
memory until a later one needs its frames, the one used longest ago first; each trainable unit is reduced once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    moves = plan.weights is not Home.HOST
    if moves:
        for index in range(len(plan.units)):
            if not frames.hold(index):
                yield _all_gather(plan, "forward", index)
    backward = [index for index in reversed(range(len(plan.units))) if not plan.units[index].span]
    spans = [index for index in range(len(plan.units)) if plan.units[index].span]
    for index in [*backward, *spans]:
        if moves and index in backward and not frames.hold(index):
            yield _all_gather(plan, "backward", index)
        if plan.units[index].trainable and plan.wire == "collective":
            yield _reduce(plan, index, wire)
    if plan.wire == "collective" and not moves and not plan.replicated:
        for index in range(len(plan.units)):
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
    """Which units' weights are in memory: those held, and as many others as fit, the last used first."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sizes = [-(-padded(unit, plan.world) * plan.compute.itemsize // FRAME) * FRAME for unit in plan.units]
        self._used: list[int] = []

    def hold(self, index: int) -> bool:
        """Uses a unit; whether it was still there."""
        there = index in self._used
        if there:
            self._used.remove(index)
        self._used.append(index)
        room = self._plan.gathered_bytes
        while sum(self._sizes[each] for each in self._used) > room:
            oldest = next((each for each in self._used if not self._plan.units[each].span and each != index), None)
            if oldest is None:
                break
            self._used.remove(oldest)
        return there
