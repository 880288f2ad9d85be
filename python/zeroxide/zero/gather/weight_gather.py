"""Weights that no rank has all of: each unit's shards come together under its window for as long as it is used."""

from __future__ import annotations

import threading

import torch

from zeroxide import _core
from zeroxide.device.placement import view_of
from zeroxide.zero.messages import Messages, Work
from zeroxide.zero.passes import UnitState
from zeroxide.zero.unit import Unit

__all__ = ["MovingWeights"]


class MovingWeights:
    """Gathers and releases units, and knows which of them are on their way.

    Every rank gathers the same units, ahead or not, in the same order; a unit's own part is there from the moment it is
    held. The other ranks' parts are received right under its window where nobody looks. Where somebody may, they are
    received beside it, and everything appears at once.
    """

    def __init__(self, core: _core.Offload, messages: Messages, stays: bool) -> None:
        self.core = core
        self.messages = messages
        self.sent_bytes = 0
        # Weights that are at home in host memory lie under their windows at all times.
        self._stays = stays
        # A reader that nothing announced is served by a thread of its own.
        self._busy = threading.RLock()
        self._flights: dict[int, Work] = {}
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
        rank, others = messages.ranks.rank, messages.others()
        size = unit.layout_numel // messages.ranks.world
        own = flat[rank * size : (rank + 1) * size]
        incoming = [(other, flat[other * size : (other + 1) * size]) for other in others]
        # Known before its first message is on its way: a start that fails half-way keeps the unit held.
        work = messages.work("all-gather", unit)
        self._flights[unit.index] = work
        self._coming.add(unit.index)
        messages.start(work, incoming, [(other, own) for other in others])
        self.sent_bytes += own.nbytes * len(others)

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
