"""Weights that no rank has all of: each unit's shards come together under its window for as long as it is used."""

from __future__ import annotations

from zeroxide import _core
from zeroxide.zero.messages import Flight, Messages
from zeroxide.zero.unit import Unit

__all__ = ["MovingWeights"]


class MovingWeights:
    """Gathers and releases units, and knows which of them are on their way.

    Every rank gathers the same units, ahead or not, in the same order; a unit's own part is under its window from the
    moment it is held, and the other ranks' parts are received right there.
    """

    def __init__(self, core: _core.Offload, messages: Messages) -> None:
        self.core = core
        self.messages = messages
        self.sent_bytes = 0
        self._flights: dict[int, Flight] = {}
        # Of these, the units whose parts have not all been waited for.
        self._coming: set[int] = set()

    def gather(self, unit: Unit) -> None:
        """Makes all of the unit's weights readable. Idempotent. Raises RanksError, StorageError."""
        if unit.index not in self._flights:
            if self.core.gather(unit.index):
                return
            self._start(unit)
        self._receive(unit.index)

    def gather_ahead(self, unit: Unit) -> bool:
        """Begins to gather the unit and holds it, if there is room beside the units that are held."""
        whole = self.core.gather_ahead(unit.index)
        if whole is None:
            return False
        if not whole:
            self._start(unit)
        return True

    def release(self, unit: Unit) -> None:
        """Ends the use of the unit, once the other ranks have its part. Idempotent."""
        if unit.index in self._flights:
            self._end(unit.index)
        self.core.release(unit.index)

    def settle(self) -> None:
        """Ends what is on its way: weights are about to change, and a held unit has to be gathered again after that."""
        for index in list(self._flights):
            self._end(index)

    def _end(self, index: int) -> None:
        # Forgotten last: a wait that fails leaves the unit held, and whoever comes again waits again.
        self._receive(index)
        self._flights[index].sent()
        del self._flights[index]

    def _start(self, unit: Unit) -> None:
        messages, flat = self.messages, unit.flat
        rank, others = messages.ranks.rank, messages.others()
        size = unit.layout_numel // messages.ranks.world
        own = flat[rank * size : (rank + 1) * size]
        incoming = [(other, flat[other * size : (other + 1) * size]) for other in others]
        # Known before its first message is on its way: a start that fails half-way keeps the unit held.
        flight = messages.flight("all-gather", unit)
        self._flights[unit.index] = flight
        self._coming.add(unit.index)
        messages.start(flight, incoming, [(other, own) for other in others])
        self.sent_bytes += own.nbytes * len(others)

    def _receive(self, index: int) -> None:
        if index in self._coming:
            self._flights[index].received()
            self.core.set_whole(index)
            self._coming.discard(index)
