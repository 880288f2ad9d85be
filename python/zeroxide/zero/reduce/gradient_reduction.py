"""Gradients of a backward from every rank to those that update with them.

Gradients of a unit go out once, when its part of a backward is complete, and each rank sums those of its shard in fp32
in rank order. Two ways give the same bits:

- `SharedGradients`, between ranks of one host: gradients lie in shared memory, where every rank reads its shard.
- `CollectiveGradients`, for everything else: one all-to-all a unit, straight out of the room in which its gradients
  accumulated, which is waited for and summed when the next unit is complete. Units are reduced in one fixed order, so
  that ranks whose modules ran in different orders still meet.

Where several ranks keep the same shard (hybrid sharding), each sums one slice of it over all ranks, in the order of all
ranks, and sends the others that sum: what a group adds up is never added to what another has. Through shared memory
each sums all of its shard instead, since the bytes of all are at hand.
"""

from __future__ import annotations

from typing import Protocol

import torch

from zeroxide import _core
from zeroxide.device.placement import memory_at
from zeroxide.distributed import COMMS, Began
from zeroxide.errors import RanksError
from zeroxide.zero.messages import Messages, Work
from zeroxide.zero.passes import GradientState
from zeroxide.zero.reduce.sent import SentGradients
from zeroxide.zero.unit import Unit

__all__ = ["CollectiveGradients", "GradientReduction", "SharedGradients", "SingleRankGradients"]


class GradientReduction(Protocol):
    """What a backward needs of the ranks that have gradients of the same weights."""

    @property
    def sent(self) -> SentGradients:
        """Bytes of gradients that left this rank for others."""

    def send(self, unit: Unit) -> None:
        """The unit's gradients of this backward are complete: from here on none may arrive."""

    def reduce(self, unit: Unit) -> None:
        """Reduces what has been accumulated of the unit, and waits for it: more of this backward may come afterwards.

        All ranks call it for the same units in the same order, and then do without `send` and `end_backward`.
        """

    def end_backward(self) -> None:
        """Reduces every unit of this backward that is still to be reduced."""

    def abandon(self) -> None:
        """A backward failed on this rank: what it has sent and others have not can no longer be matched."""


class SingleRankGradients:
    """One rank: gradients are where they belong as soon as they have been accumulated."""

    sent = SentGradients()

    def send(self, unit: Unit) -> None:
        """More may come: nobody waits for them."""

    def reduce(self, unit: Unit) -> None:
        """They are where they belong."""

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
        self.sent = SentGradients()
        self.wait = messages.watch.wait
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
        self._leaving = {unit.index: _read_by_others(unit, dtype) for unit in self.trainable}
        """Of each unit, the bytes that ranks of its shard group read, and those that others do."""
        self._logged: dict[int, Began | None] = {}

    def send(self, unit: Unit) -> None:
        """Also sums the units that all ranks have sent by now."""
        self._check_whole()
        if unit.gradients is GradientState.SENT:
            return
        within, across = self._leaving[unit.index]
        if COMMS.enabled:
            # What a rank reads of others is as much as they read of it.
            size, ranks = within + across, unit.groups.world
            self._logged[unit.index] = COMMS.begin("reduce_scatter", size, ranks, what="in memory", unit=unit.name)
        self.wait("room for gradients", unit.name, self.core.send, unit.index)
        unit.gradients = GradientState.SENT
        self._waiting.append(unit)
        reductions = self.sent.reductions
        reductions.within += within
        reductions.across += across
        self._waiting = [
            each for each in self._waiting if not self._received(each, self.core.receive(each.index, False))
        ]

    def reduce(self, unit: Unit) -> None:
        """A round of its own."""
        self.send(unit)
        if unit in self._waiting:
            self._waiting.remove(unit)
            self._received(unit, self.wait("gradients", unit.name, self.core.receive, unit.index, True))
        unit.gradients = GradientState.OPEN

    def _received(self, unit: Unit, complete: bool) -> bool:
        if complete and self._logged:
            COMMS.end(self._logged.pop(unit.index, None))
        return complete

    def end_backward(self) -> None:
        """Waits for the other ranks."""
        self._check_whole()
        for unit in self.trainable:
            self.send(unit)
        for unit in self._waiting:
            self._received(unit, self.wait("gradients", unit.name, self.core.receive, unit.index, True))
        self._waiting.clear()
        self._end()


def _read_by_others(unit: Unit, dtype: torch.dtype) -> tuple[int, int]:
    groups = unit.groups
    # What a rank keeps, each other rank reads.
    share = unit.layout_numel * dtype.itemsize // groups.shard.size
    near = (groups.world if groups.replicated else groups.shard.size) - 1
    return share * near, share * (groups.world - 1 - near)


class CollectiveGradients(_BetweenRanks):
    """Between any ranks, by messages over torch.distributed.

    kept: the dtype in which sums are kept.
    """

    def __init__(
        self, core: _core.Offload, units: list[Unit], messages: Messages, dtype: torch.dtype, *, kept: torch.dtype
    ) -> None:
        super().__init__(core, units, messages, dtype)
        self._kept = kept
        # Backward runs roughly from the last unit to the first; what is left at the root ends last.
        self._order = sorted(self.trainable, key=lambda unit: (unit.held_through_backward, -unit.index))
        self._next = 0
        self._reducing: tuple[Unit, Work] | None = None
        self._updating: Work | None = None

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
        self._end_update()
        self._next = 0
        self._end()

    def reduce(self, unit: Unit) -> None:
        """Nothing is on its way but the unit."""
        self._check_whole()
        self._begin_reduce(unit)
        self._end_reduce()
        self._end_update()

    def _begin_reduce(self, unit: Unit) -> None:
        self._end_reduce()
        self.core.send(unit.index)
        if unit.groups.world == 1:
            # Experts that no other rank has.
            self.core.receive_from(unit.index)
            return
        outgoing = memory_at(*self.core.outgoing(unit.index), self.dtype)
        incoming = memory_at(*self.core.incoming(unit.index), self.dtype)
        groups = unit.groups
        own, owners = groups.everyone[groups.rank], groups.owners()
        size = incoming.numel() // (groups.world - 1)
        # Rank after rank, without this one; to each the slice that it sums, beginning with the next one's.
        place = {rank: at for at, rank in enumerate(rank for rank in groups.everyone if rank != own)}
        first = owners.index(own) + 1
        turned = [(at % groups.world, owners[at % groups.world]) for at in range(first, first + groups.world - 1)]
        arriving = [(rank, incoming[place[rank] * size : (place[rank] + 1) * size]) for _, rank in turned]
        if groups.replicated:
            leaving = [(rank, outgoing) for _, rank in turned]
        else:
            leaving = [(rank, outgoing[at * size : (at + 1) * size]) for at, rank in turned]
        work = self.messages.work("all-gather of gradients" if groups.replicated else "all-to-all", unit)
        self._reducing = unit, work
        self.messages.start(work, arriving, leaving)
        near = len(place) if groups.replicated else groups.near - 1
        self.sent.reductions.within += size * self.dtype.itemsize * near
        self.sent.reductions.across += size * self.dtype.itemsize * (len(place) - near)

    def _end_reduce(self) -> None:
        if self._reducing is not None:
            unit, work = self._reducing
            work.received()
            work.sent()
            self.core.receive_from(unit.index)
            self._reducing = None
            if not unit.groups.replicated and unit.groups.replicate.size > 1:
                self._end_update()
                self._begin_update(unit)

    def _begin_update(self, unit: Unit) -> None:
        """Sends the sums of this rank's slice to the other replicas of its shard, and receives those of theirs."""
        kept = memory_at(*self.core.kept_gradients(unit.index), self._kept)
        replicas = unit.groups.replicate
        size = kept.numel() // replicas.size
        own = kept[replicas.position * size : (replicas.position + 1) * size]
        others = replicas.others()
        work = self.messages.work("all-gather of sums", unit)
        self._updating = work
        incoming = [(rank, kept[position * size : (position + 1) * size]) for position, rank in others]
        self.messages.start(work, incoming, [(rank, own) for _, rank in others])
        self.sent.updates.across += own.nbytes * len(others)

    def _end_update(self) -> None:
        if self._updating is not None:
            self._updating.received()
            self._updating.sent()
            self._updating = None
