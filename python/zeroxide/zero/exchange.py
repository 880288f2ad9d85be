"""Weights and gradients between ranks: one place for all that a unit's life needs of the others.

Gradients of a unit go out once, when its part of a backward is complete, and each rank sums those of its shard in fp32
in rank order. Two carriers give the same bits:

- `SharedExchange`, between ranks of one host: gradients lie in shared memory, where every rank reads its shard of them;
  weights at home in host memory are one copy for all ranks, so gathering them moves nothing.
- `CollectiveExchange`, for everything else: one all-to-all a unit, straight out of the room in which its gradients
  accumulated, which is waited for and summed when the next unit is complete. Units are reduced in one fixed order, so
  that
  ranks whose modules ran in different orders still meet.

Weights that move are gathered in the same way by both (`MovingWeights`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Protocol

import torch

from zeroxide import _core
from zeroxide.device.placement import memory_at
from zeroxide.distributed import Ranks, Watch
from zeroxide.errors import RanksError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan
from zeroxide.zero.gather.weight_gather import MovingWeights
from zeroxide.zero.messages import Messages, Work
from zeroxide.zero.unit import Unit

__all__ = ["CollectiveExchange", "Exchange", "SharedExchange", "SingleRank", "Totals", "agree_on_norm", "make_exchange"]

Totals = tuple[float, bool, int]
"""Sum of squares of all gradients, whether one is not finite, parameters that have one."""

_HEAD = struct.Struct("<d?")


class Exchange(Protocol):
    """What hooks and engine ask of the other ranks."""

    closed: set[int]
    """Units whose gradients of this backward have gone out: no other may arrive. The same set at all times."""

    @property
    def sent_bytes(self) -> int:
        """Bytes of gradients and weights that left this rank for others."""

    def connect(self) -> None:
        """Takes up the connection. Every rank calls it once, before weights are filled."""

    def gather(self, unit: Unit) -> None:
        """Makes the unit's weights readable, the other ranks' parts included, and holds them. Idempotent."""

    def gather_ahead(self, unit: Unit) -> bool:
        """Begins to gather the unit and holds it, unless what is held leaves no room. The same on all ranks."""

    def release(self, unit: Unit) -> None:
        """Ends the use of the unit's weights. Idempotent."""

    def drain(self) -> None:
        """Weights are about to change: what is gathered must not be taken for the new ones."""

    def cover(self, unit: Unit) -> None:
        """The unit's weights are about to change: nobody may see that half done."""

    def send(self, unit: Unit) -> None:
        """The unit's gradients of this backward are complete."""

    def abandon(self) -> None:
        """A backward failed on this rank: what it has sent and others have not can no longer be matched."""

    def end_backward(self) -> None:
        """Reduces every unit of this backward that is still to be reduced."""

    def after_step(self) -> None:
        """The optimizer step has begun on every rank. Afterwards weights that are always full are the new ones."""


class SingleRank:
    """One rank: nothing to exchange."""

    def __init__(self, core: _core.Offload, *, params_always_full: bool) -> None:
        self.core = core
        self.params_always_full = params_always_full
        self.closed: set[int] = set()

    @property
    def sent_bytes(self) -> int:
        """Nothing leaves."""
        return 0

    def connect(self) -> None:
        """Nobody to connect with."""

    def gather(self, unit: Unit) -> None:
        """The core has all of it."""
        self.core.gather(unit.index)

    def gather_ahead(self, unit: Unit) -> bool:
        """There is nothing to wait for but the disk, which the core reads ahead."""
        return False

    def release(self, unit: Unit) -> None:
        """The core's memory may go to another unit."""
        self.core.release(unit.index)

    def drain(self) -> None:
        """The core knows what it has."""

    def cover(self, unit: Unit) -> None:
        """Whoever may read it makes the step end before it returns."""

    def send(self, unit: Unit) -> None:
        """The gradients are where they belong."""

    def abandon(self) -> None:
        """The gradients that have been accumulated are forgotten by `zero_grad`."""

    def end_backward(self) -> None:
        """Nothing is outstanding."""

    def after_step(self) -> None:
        """No other rank has a part of the weights."""
        if self.params_always_full:
            self.core.finish()


class _Carrier:
    """What both carriers have: weights that move, and what has left this rank."""

    def __init__(self, core: _core.Offload, messages: Messages, comm_dtype: torch.dtype, stays: bool) -> None:
        self.core = core
        self.messages = messages
        self.ranks = messages.ranks
        self.watch = messages.watch
        self.comm_dtype = comm_dtype
        self.closed: set[int] = set()
        self.broken = False
        self.moved = MovingWeights(core, messages, stays)
        self._reduced_bytes = 0

    @property
    def sent_bytes(self) -> int:
        """Bytes of gradients and weights that left this rank for others."""
        return self._reduced_bytes + self.moved.sent_bytes

    def gather(self, unit: Unit) -> None:
        """One all-gather, unless all parts are there or have been sent for."""
        self.moved.gather(unit)

    def gather_ahead(self, unit: Unit) -> bool:
        """Begins that all-gather."""
        return self.moved.gather_ahead(unit)

    def release(self, unit: Unit) -> None:
        """Ends the use of the unit's weights."""
        self.moved.release(unit)

    def drain(self) -> None:
        """Ends the gathers that are on their way."""
        self.moved.drain()

    def cover(self, unit: Unit) -> None:
        """Reads of it fault until it is gathered again."""
        self.moved.cover(unit)

    def abandon(self) -> None:
        """Everything from here on is refused."""
        self.broken = True


class SharedExchange(_Carrier):
    """Between ranks of one host, through shared memory."""

    def __init__(
        self,
        core: _core.Offload,
        units: list[Unit],
        messages: Messages,
        comm_dtype: torch.dtype,
        *,
        params_always_full: bool,
        stays: bool,
    ) -> None:
        super().__init__(core, messages, comm_dtype, stays)
        self.shown = units if params_always_full else []
        self.trainable = [unit for unit in units if unit.num_trainable]
        self.waiting: list[Unit] = []

    def connect(self) -> None:
        """Raises RanksError when another rank's memory cannot be reached."""
        handles = self.ranks.gather_objects(self.core.segment_handle())
        try:
            self.core.join([(int(pid), int(descriptor)) for pid, descriptor in handles])
        finally:
            # Nobody closes what another is still opening.
            self.ranks.barrier()

    def gather(self, unit: Unit) -> None:
        """Waits until every rank has updated its part; moves only weights that are at home on disk."""
        with self.watch.waiting("weights", unit.name):
            self.moved.gather(unit)

    def send(self, unit: Unit) -> None:
        """Also sums the units that all ranks have sent by now."""
        check_not_broken(self.broken)
        if unit.index in self.closed:
            return
        with self.watch.waiting("room for gradients", unit.name):
            self.core.send(unit.index)
        self.closed.add(unit.index)
        self.waiting.append(unit)
        share = unit.layout_numel * self.comm_dtype.itemsize // self.ranks.world
        self._reduced_bytes += share * (self.ranks.world - 1)
        self.waiting = [each for each in self.waiting if not self.core.receive(each.index, False)]

    def end_backward(self) -> None:
        """Waits for the other ranks."""
        check_not_broken(self.broken)
        for unit in self.trainable:
            self.send(unit)
        for unit in self.waiting:
            with self.watch.waiting("gradients", unit.name):
                self.core.receive(unit.index, True)
        self.waiting.clear()
        self.closed.clear()

    def after_step(self) -> None:
        """Ends the step here: a rank that does something else next, or nothing, must not keep the others waiting."""
        self.core.finish()
        # The one copy has every rank's part when all have updated theirs.
        for unit in self.shown:
            self.gather(unit)
            self.release(unit)


class CollectiveExchange(_Carrier):
    """Between any ranks, by messages over torch.distributed.

    `replicated`: every rank keeps all gradients (stage 0). `params_always_full`: every rank keeps all weights (stages
    0 to 2),
    which are brought up to date right after a step.
    """

    def __init__(
        self,
        core: _core.Offload,
        units: list[Unit],
        messages: Messages,
        comm_dtype: torch.dtype,
        *,
        replicated: bool,
        params_always_full: bool,
        stays: bool,
    ) -> None:
        super().__init__(core, messages, comm_dtype, stays)
        self.replicated = replicated
        self.params_always_full = params_always_full
        self.refreshed = units if params_always_full and not replicated else []
        # Backward runs roughly from the last unit to the first; what is left at the root ends last.
        self.order = sorted(
            (unit for unit in units if unit.num_trainable), key=lambda unit: (unit.held_through_backward, -unit.index)
        )
        self.next = 0
        self.reducing: tuple[Unit, Work] | None = None

    def connect(self) -> None:
        """The process group is the connection."""

    def send(self, unit: Unit) -> None:
        """Begins to reduce as many units as are complete and next in order, each when the one before is done."""
        check_not_broken(self.broken)
        self.closed.add(unit.index)
        while self.next < len(self.order) and self.order[self.next].index in self.closed:
            self._begin_reduce(self.order[self.next])
            self.next += 1

    def end_backward(self) -> None:
        """Reduces what is left."""
        check_not_broken(self.broken)
        for unit in self.order[self.next :]:
            self._begin_reduce(unit)
        self._end_reduce()
        self.closed.clear()
        self.next = 0

    def after_step(self) -> None:
        """Weights that every rank keeps are gathered here and not where they are used: ranks may use different ones.

        With state on disk each unit's parts travel while the next one is updated.
        """
        before = None
        for unit in self.refreshed:
            self.moved.gather_ahead(unit)
            if before is not None:
                self.moved.release(before)
            before = unit
        if before is not None:
            self.moved.release(before)
        if self.params_always_full:
            self.core.finish()

    def _begin_reduce(self, unit: Unit) -> None:
        self._end_reduce()
        self.core.send(unit.index)
        outgoing = memory_at(*self.core.outgoing(unit.index), self.comm_dtype)
        incoming = memory_at(*self.core.incoming(unit.index), self.comm_dtype)
        world, others = self.messages.ranks.world, self.messages.others()
        size = incoming.numel() // (world - 1)
        # Rank after rank, without this one.
        place = {other: other - (other > self.messages.ranks.rank) for other in others}
        arriving = [(other, incoming[place[other] * size : (place[other] + 1) * size]) for other in others]
        if self.replicated:
            leaving = [(other, outgoing) for other in others]
        else:
            leaving = [(other, outgoing[other * size : (other + 1) * size]) for other in others]
        kind = "all-gather of gradients" if self.replicated else "all-to-all"
        work = self.messages.work(kind, unit)
        self.reducing = unit, work
        self.messages.start(work, arriving, leaving)
        self._reduced_bytes += size * self.comm_dtype.itemsize * len(others)

    def _end_reduce(self) -> None:
        if self.reducing is not None:
            unit, work = self.reducing
            work.received()
            work.sent()
            self.core.receive_from(unit.index)
            self.reducing = None


def check_not_broken(broken: bool) -> None:
    """Raises RanksError after a backward that failed."""
    if broken:
        raise RanksError(
            "a backward failed on this rank after gradients may have gone out to the others: make the engine again and "
            "go on from the last checkpoint"
        )


def make_exchange(
    core: _core.Offload, plan: Plan, units: list[Unit], messages: Messages, comm_dtype: torch.dtype
) -> Exchange:
    """What carries the units of `plan` between its ranks; `comm_dtype` is the dtype in which gradients travel."""
    if plan.world == 1:
        return SingleRank(core, params_always_full=plan.params_always_full)
    stays = plan.weights is Home.HOST
    if plan.transport == "shared":
        return SharedExchange(
            core, units, messages, comm_dtype, params_always_full=plan.params_always_full, stays=stays
        )
    return CollectiveExchange(
        core,
        units,
        messages,
        comm_dtype,
        replicated=plan.replicated,
        params_always_full=plan.params_always_full,
        stays=stays,
    )


def agree_on_norm(core: _core.Offload, ranks: Ranks, watch: Watch) -> Totals:
    """The norm over all ranks; afterwards a parameter has been accumulated where it has on any rank.

    The ranks' sums are added in double precision in rank order, so that every rank has the same bits.
    """
    total, nonfinite, accumulated = core.grad_norm()
    if ranks.world == 1:
        return total, nonfinite, accumulated
    # What another rank waits for must not wait for this exchange.
    core.finish()
    payload = bytearray(_HEAD.pack(total, nonfinite) + core.accumulated())
    with watch.waiting("the gradient norm"):
        rows = ranks.gather_rows(torch.frombuffer(payload, dtype=torch.uint8))
    heads = [_HEAD.unpack(bytes(row[: _HEAD.size].tolist())) for row in rows]
    everywhere = rows[:, _HEAD.size :].amax(0)
    core.set_accumulated(bytes(everywhere.tolist()))
    return _sum(head[0] for head in heads), any(head[1] for head in heads), int(everywhere.sum())


def _sum(values: Iterable[float]) -> float:
    # Not the builtin: from Python 3.12 on that one compensates for rounding, and bits would depend on the version.
    total = 0.0
    for value in values:
        total += value
    return total
