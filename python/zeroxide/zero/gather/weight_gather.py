"""Weights from where they are at home to under their windows, for as long as they are used.

With one rank the core has all of a unit. With several, each unit's shards come together from the ranks of its shard
group, so that no weight crosses from one group to another: on one host, weights at home in host memory are one copy for
the group (`HostWeights`), so gathering them moves nothing; everything else is an all-gather, of shards on disk between
ranks of one host (`SharedWeights`) or of any between any ranks (`CollectiveWeights`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Protocol

import torch

from zeroxide import _core
from zeroxide.device.placement import view_of
from zeroxide.zero.messages import Messages
from zeroxide.zero.passes import UnitState
from zeroxide.zero.unit import Unit

__all__ = [
    "CollectiveWeights",
    "HostWeights",
    "SharedWeights",
    "SingleRankWeights",
    "WeightGather",
]


class WeightGather(Protocol):
    """What a unit's life needs of the ranks that have parts of its weights."""

    @property
    def sent_bytes(self) -> int:
        """Bytes of weights that left this rank for others of its shard group."""

    @property
    def sent_across(self) -> int:
        """Of these, the bytes that left its group where a shard group has groups within it."""

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

    def after_step(self) -> None:
        """The optimizer step has begun on every rank. Afterwards weights that are always full are the new ones."""


class _LocalWeights:
    """Weights that are all in the core of this process: no message brings them.

    stays: whether they are at home under their windows. Then nothing but an update changes them or takes them away, and
    a unit whose update has ended is asked for no more until the next one.
    """

    sent_bytes = 0
    sent_across = 0

    def __init__(self, core: _core.Offload, *, stays: bool) -> None:
        self.core = core
        self._stays = stays
        # Units at home under their windows that no update is under way for.
        self._ready: set[int] = set()

    def gather(self, unit: Unit) -> None:
        """Makes the unit's weights readable, once its update has ended."""
        if unit.index in self._ready:
            return
        self._gather(unit)
        if self._stays:
            self._ready.add(unit.index)

    def _gather(self, unit: Unit) -> None:
        self.core.gather(unit.index)

    def gather_ahead(self, unit: Unit) -> bool:
        """Nothing is sent for; from a disk the core reads ahead itself."""
        return False

    def release(self, unit: Unit) -> None:
        """The core may give the memory to another unit, where it is not the weights' home."""
        if not self._stays:
            self.core.release(unit.index)

    def drain(self) -> None:
        """Nothing is on its way; the next use waits for the update."""
        self._ready.clear()

    def cover(self, unit: Unit) -> None:
        """Whoever may read it makes the step end before it returns."""


class SingleRankWeights(_LocalWeights):
    """One rank: the core has all weights."""

    def __init__(self, core: _core.Offload, *, stays: bool, params_always_full: bool) -> None:
        super().__init__(core, stays=stays)
        self.params_always_full = params_always_full

    def after_step(self) -> None:
        """No other rank has a part of the weights."""
        if self.params_always_full:
            self.core.finish()


class HostWeights(_LocalWeights):
    """Ranks of one host with one copy of all weights, at home in host memory and each updated by one of them.

    shown: units whose weights always show their values.
    """

    def __init__(self, core: _core.Offload, messages: Messages, shown: Iterable[Unit]) -> None:
        super().__init__(core, stays=True)
        self.wait = messages.watch.wait
        self._shown = list(shown)

    def _gather(self, unit: Unit) -> None:
        # Every rank has to have updated its part.
        here = self.wait("weights", unit.name, self.core.gather, unit.index)
        assert here, "one copy is never in parts"

    def after_step(self) -> None:
        """As `SharedWeights.after_step`."""
        _end_step_here(self.core, self, self._shown)


class Waited(Protocol):
    """What is on its way, as `Work` is waited for."""

    def received(self) -> None:
        """Waits until everything has arrived. Raises RanksError when a rank is lost."""

    def sent(self) -> None:
        """Waits until everything has left. Raises RanksError when a rank is lost."""


class GatheredWeights:
    """Weights of which no rank has all: what all-gathers have in common. It knows which units are on their way.

    Every rank gathers the same units, ahead or not, in the same order; a unit's own part is there from the moment it is
    held. The other ranks' parts are received right under its window where nobody looks. Where somebody may, they are
    received beside it, and everything appears at once.
    """

    def __init__(self, core: _core.Offload, messages: Messages, stays: bool) -> None:
        self.core = core
        self.messages = messages
        self.sent_bytes = 0
        self.sent_across = 0
        # Weights that are at home in host memory lie under their windows at all times.
        self._stays = stays
        # A reader that nothing announced is served by a thread of its own.
        self._busy = threading.RLock()
        self._flights: dict[int, Waited] = {}
        # Of these, the units whose parts have not all been waited for.
        self._coming: set[int] = set()
        # Of those, the ones that are received beside their windows.
        self._unseen: set[int] = set()

    def gather(self, unit: Unit) -> None:
        """Makes all of the unit's weights readable. Idempotent. Raises RanksError, StorageError."""
        with self._busy:
            if unit.index not in self._flights:
                if self.core.gather(unit.index, self._has_readers(unit)):
                    return
                self._start(unit)
            self._receive(unit.index)

    def gather_ahead(self, unit: Unit) -> bool:
        """Begins to gather the unit and holds it, if there is room beside the units that are held."""
        with self._busy:
            all_shards_valid = self.core.gather_ahead(unit.index, self._has_readers(unit))
            if all_shards_valid is None:
                return False
            if not all_shards_valid:
                self._start(unit)
            return True

    def release(self, unit: Unit) -> None:
        """Ends the use of the unit, once the other ranks have its part. Idempotent."""
        with self._busy:
            if unit.index in self._flights:
                self._end(unit.index)
            self.core.release(unit.index)

    def drain(self) -> None:
        """Ends what is on its way: weights are about to change, and a held unit has to be gathered again after that."""
        with self._busy:
            for index in list(self._flights):
                self._end(index)

    def cover(self, unit: Unit) -> None:
        """The unit's weights are about to change: whoever reads them unannounced must not see that half done."""
        if unit.has_readers():
            self.core.cover(unit.index)

    def _end(self, index: int) -> None:
        # Forgotten last: a wait that fails leaves the unit held, and whoever comes again waits again.
        self._receive(index)
        self._flights[index].sent()
        del self._flights[index]

    def _start(self, unit: Unit) -> None:
        messages, flat = self.messages, self._room(unit)
        group = unit.groups.shard
        size = unit.layout_numel // group.size
        own = flat[group.position * size : (group.position + 1) * size]
        others = group.others()
        incoming = [(rank, flat[position * size : (position + 1) * size]) for position, rank in others]
        # Known before its first message is on its way: a start that fails half-way keeps the unit held.
        work = messages.work("all-gather", unit)
        self._flights[unit.index] = work
        self._coming.add(unit.index)
        messages.start(work, incoming, [(rank, own) for _, rank in others])
        self.sent_bytes += own.nbytes * len(others)
        self.sent_across += own.nbytes * (group.size - min(group.size, unit.groups.near))

    def _room(self, unit: Unit) -> torch.Tensor:
        """Where the unit's own part is and the others' parts go, flat."""
        beside = self.core.beside(unit.index)
        if beside is None:
            return unit.flat
        self._unseen.add(unit.index)
        return view_of(beside, unit.flat.dtype)

    def _receive(self, index: int) -> None:
        if index in self._coming:
            self._flights[index].received()
            if index in self._unseen:
                # The pages are about to move: what the others receive is read from them, too.
                self._flights[index].sent()
            self.core.set_all_shards_valid(index)
            self._coming.discard(index)
            self._unseen.discard(index)

    def _has_readers(self, unit: Unit) -> bool:
        """Whether somebody may read the unit while its parts arrive: by its parameters, or by views from before."""
        return not self._stays and (unit.state is UnitState.GATHERED or unit.has_readers())


class SharedWeights(GatheredWeights):
    """Between ranks of one host that each have a shard on disk.

    shown: units whose weights always show their values.
    """

    def __init__(self, core: _core.Offload, messages: Messages, shown: Iterable[Unit]) -> None:
        super().__init__(core, messages, stays=False)
        self._shown = list(shown)

    def gather(self, unit: Unit) -> None:
        """Waits until every rank has updated its part."""
        self.messages.watch.wait("weights", unit.name, super().gather, unit)

    def after_step(self) -> None:
        """Ends the step here: a rank that does something else next, or nothing, must not keep the others waiting."""
        _end_step_here(self.core, self, self._shown)


class CollectiveWeights(GatheredWeights):
    """Between any ranks, by messages over torch.distributed.

    refreshed: units that every rank keeps (stages 1 and 2), brought up to date right after a step.
    params_always_full: whether weights are there at all times.
    """

    def __init__(
        self,
        core: _core.Offload,
        messages: Messages,
        stays: bool,
        refreshed: Iterable[Unit],
        *,
        params_always_full: bool,
    ) -> None:
        super().__init__(core, messages, stays)
        self._refreshed = list(refreshed)
        self._params_always_full = params_always_full

    def after_step(self) -> None:
        """Weights that every rank keeps are gathered here and not where they are used: ranks may use different ones.

        With state on disk each unit's parts travel while the next one is updated.
        """
        before = None
        for unit in self._refreshed:
            self.gather_ahead(unit)
            if before is not None:
                self.release(before)
            before = unit
        if before is not None:
            self.release(before)
        if self._params_always_full:
            self.core.finish()


def _end_step_here(core: _core.Offload, weights: WeightGather, shown: Iterable[Unit]) -> None:
    core.finish()
    # Weights have every rank's part when all have updated theirs.
    for unit in shown:
        weights.gather(unit)
        weights.release(unit)
