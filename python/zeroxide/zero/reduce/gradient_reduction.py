"""Gradients of a backward from every rank to those that update with them.

Gradients of a unit go out once, when its part of a backward is complete, and each rank sums those of its shard in fp32
in rank order. Two ways give the same bits:

- `SharedGradients`, between ranks of one host: gradients lie in shared memory, where every rank reads its shard.
- `CollectiveGradients`, for everything else: one all-to-all a unit, straight out of the room in which its gradients
  accumulated, which is waited for and summed when the next unit is complete. Units are reduced in one fixed order, so
  that
  ranks whose modules ran in different orders still meet.

The group is that of the `Messages` which a reduction is given.
"""

from __future__ import annotations

from typing import Protocol

import torch

from zeroxide import _core
from zeroxide.device.placement import memory_at
from zeroxide.errors import RanksError
from zeroxide.plan.plan import Plan
from zeroxide.zero.messages import Messages, Work
from zeroxide.zero.passes import GradientState
from zeroxide.zero.unit import Unit

__all__ = ["CollectiveGradients", "GradientReduction", "SharedGradients", "SingleRankGradients", "make_reduction"]


class GradientReduction(Protocol):
    """What a backward needs of the ranks that have gradients of the same weights."""

    @property
    def sent_bytes(self) -> int:
        """Bytes of gradients that left this rank for others."""

    def send(self, unit: Unit) -> None:
        """The unit's gradients of this backward are complete: from here on none may arrive."""

    def end_backward(self) -> None:
        """Reduces every unit of this backward that is still to be reduced."""

    def abandon(self) -> None:
        """A backward failed on this rank: what it has sent and others have not can no longer be matched."""


class SingleRankGradients:
    """One rank: gradients are where they belong as soon as they have been accumulated."""

    sent_bytes = 0

    def send(self, unit: Unit) -> None:
        """More may come: nobody waits for them."""

    def end_backward(self) -> None:
        """Nothing is outstanding."""

    def abandon(self) -> None:
        """The gradients that have been accumulated are forgotten by `zero_grad`."""


class _BetweenRanks:
    """What both ways have: the units that have gradients, and what has left this rank."""

    def __init__(self, core: _core.Offload, units: list[Unit], messages: Messages, dtype: torch.dtype) -> None:
        self.core = core
        self.messages = messages
        self.dtype = dtype
        """That in which gradients travel."""
        self.trainable = [unit for unit in units if unit.num_trainable]
        self.sent_bytes = 0
        self._broken = False

    def abandon(self) -> None:
        """Everything from here on is refused."""
        self._broken = True

    def _check_whole(self) -> None:
        """Raises RanksError after a backward that failed."""
        if self._broken:
            raise RanksError(
                "a backward failed on this rank after gradients may have gone out to the others: make the engine again "
                "and go on from the last checkpoint"
            )

    def _end(self) -> None:
        """Gradients of the next backward may arrive."""
        for unit in self.trainable:
            unit.gradients = GradientState.IDLE


class SharedGradients(_BetweenRanks):
    """Between ranks of one host, through shared memory."""

    def __init__(self, core: _core.Offload, units: list[Unit], messages: Messages, dtype: torch.dtype) -> None:
        super().__init__(core, units, messages, dtype)
        self._waiting: list[Unit] = []

    def send(self, unit: Unit) -> None:
        """Also sums the units that all ranks have sent by now."""
        self._check_whole()
        if unit.gradients is GradientState.SENT:
            return
        with self.messages.watch.waiting("room for gradients", unit.name):
            self.core.send(unit.index)
        unit.gradients = GradientState.SENT
        self._waiting.append(unit)
        world = self.messages.ranks.world
        self.sent_bytes += unit.layout_numel * self.dtype.itemsize // world * (world - 1)
        self._waiting = [each for each in self._waiting if not self.core.receive(each.index, False)]

    def end_backward(self) -> None:
        """Waits for the other ranks."""
        self._check_whole()
        for unit in self.trainable:
            self.send(unit)
        for unit in self._waiting:
            with self.messages.watch.waiting("gradients", unit.name):
                self.core.receive(unit.index, True)
        self._waiting.clear()
        self._end()


class CollectiveGradients(_BetweenRanks):
    """Between any ranks, by messages over torch.distributed.

    replicated: every rank keeps all gradients (stage 0).
    """

    def __init__(
        self, core: _core.Offload, units: list[Unit], messages: Messages, dtype: torch.dtype, *, replicated: bool
    ) -> None:
        super().__init__(core, units, messages, dtype)
        self._replicated = replicated
        # Backward runs roughly from the last unit to the first; what is left at the root ends last.
        self._order = sorted(self.trainable, key=lambda unit: (unit.held_through_backward, -unit.index))
        self._next = 0
        self._reducing: tuple[Unit, Work] | None = None

    def send(self, unit: Unit) -> None:
        """Begins to reduce as many units as are complete and next in order, each when the one before is done."""
        self._check_whole()
        unit.gradients = GradientState.SENT
        while self._next < len(self._order) and self._order[self._next].gradients is GradientState.SENT:
            self._begin_reduce(self._order[self._next])
            self._next += 1

    def end_backward(self) -> None:
        """Reduces what is left."""
        self._check_whole()
        for unit in self._order[self._next :]:
            self._begin_reduce(unit)
        self._end_reduce()
        self._next = 0
        self._end()

    def _begin_reduce(self, unit: Unit) -> None:
        self._end_reduce()
        self.core.send(unit.index)
        outgoing = memory_at(*self.core.outgoing(unit.index), self.dtype)
        incoming = memory_at(*self.core.incoming(unit.index), self.dtype)
        world, others = self.messages.ranks.world, self.messages.others()
        size = incoming.numel() // (world - 1)
        # Rank after rank, without this one.
        place = {other: other - (other > self.messages.ranks.rank) for other in others}
        arriving = [(other, incoming[place[other] * size : (place[other] + 1) * size]) for other in others]
        if self._replicated:
            leaving = [(other, outgoing) for other in others]
        else:
            leaving = [(other, outgoing[other * size : (other + 1) * size]) for other in others]
        kind = "all-gather of gradients" if self._replicated else "all-to-all"
        work = self.messages.work(kind, unit)
        self._reducing = unit, work
        self.messages.start(work, arriving, leaving)
        self.sent_bytes += size * self.dtype.itemsize * len(others)

    def _end_reduce(self) -> None:
        if self._reducing is not None:
            unit, work = self._reducing
            work.received()
            work.sent()
            self.core.receive_from(unit.index)
            self._reducing = None


def make_reduction(
    core: _core.Offload, plan: Plan, units: list[Unit], messages: Messages, dtype: torch.dtype
) -> GradientReduction:
    """What reduces the gradients of `units` over the ranks that `messages` go between; they travel in `dtype`."""
    if plan.world == 1:
        return SingleRankGradients()
    if plan.transport == "shared":
        return SharedGradients(core, units, messages, dtype)
    return CollectiveGradients(core, units, messages, dtype, replicated=plan.replicated)
