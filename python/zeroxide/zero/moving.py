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

    def gather(self, unit: Unit) -> None:
        """Makes all of the unit's weights readable. Idempotent. Raises RanksError, StorageError."""
        flight = self._flights.get(unit.index)
        if flight is None:
            if self.core.gather(unit.index):
                return
            flight = self._start(unit)
        self._finish(unit, flight)

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
            self._end(unit)
        self.core.release(unit.index)

    def settle(self, units: list[Unit]) -> None:
        """Ends what is on its way: weights are about to change, and a held unit has to be gathered again after that."""
        for index in list(self._flights):
            self._end(units[index])

    def _end(self, unit: Unit) -> None:
        # Forgotten last: a wait that fails leaves the unit held, and whoever comes again waits again.
        flight = self._flights[unit.index]
        self._finish(unit, flight)
        flight.sent()
        del self._flights[unit.index]

    def _start(self, unit: Unit) -> Flight:
        messages, flat = self.messages, unit.flat
        rank, others = messages.ranks.rank, messages.others()
        size = unit.layout_numel // messages.ranks.world
        own = flat[rank * size : (rank + 1) * size]
        incoming = [(other, flat[other * size : (other + 1) * size]) for other in others]
        # Known before its first message is on its way: a start that fails half-way keeps the unit held.
        flight = self._flights[unit.index] = messages.flight("all-gather", unit)
        messages.start(flight, incoming, [(other, own) for other in others])
        self.sent_bytes += own.nbytes * len(others)
        return flight

    def _finish(self, unit: Unit, flight: Flight) -> None:
        if flight.arriving:
            flight.received()
            self.core.set_whole(unit.index)
