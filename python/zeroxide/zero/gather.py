"""Gathering ahead of use: the order of one pass is what the next one is prefetched by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from zeroxide import _core
from zeroxide.zero.exchange import Exchange
from zeroxide.zero.state import Home, UnitState
from zeroxide.zero.unit import Unit

__all__ = ["GatherOrder", "Gatherer"]


class GatherOrder:
    """The order in which the units of one kind of pass were gathered, and where the present pass is in it.

    A unit that comes out of order moves the position to its next place in the record, so that one deviation does not
    cost the rest of the pass.
    """

    def __init__(self) -> None:
        self.known: list[int] = []
        self.seen: list[int] = []
        self.position = 0

    def start(self) -> None:
        """Begins a pass: what was seen in the last one becomes what is known."""
        if self.seen:
            self.known = self.seen
        self.seen = []
        self.position = 0

    def note(self, unit: int) -> None:
        """Records that `unit` is gathered now."""
        self.seen.append(unit)
        for at in range(self.position, len(self.known)):
            if self.known[at] == unit:
                self.position = at + 1
                return

    def ahead(self, count: int) -> list[int]:
        """The next `count` units."""
        return self.known[self.position : self.position + count]

    def rest(self) -> Iterator[int]:
        """All units that are still to come, one after the other."""
        return islice(self.known, self.position, None)


class Gatherer:
    """Brings units where they are used. The one place that knows compute memory to be host memory.

    For another device the gather ends with a copy from the unit's home into a device buffer; hooks and engine only
    see `gather` and `release`.

    `visible`: parameters show their values at all times. `home`: where weights are between uses. In host memory, the
    memory under them holds the values at all times, so that they are hidden once, at the end of a pass, and not shown
    again in between. Elsewhere up to `prefetch` units that come next are held and sent for while the present one is
    used; all ranks choose the same ones, by the order of the last pass.
    """

    def __init__(
        self,
        core: _core.Offload,
        exchange: Exchange,
        units: Sequence[Unit],
        prefetch: int,
        *,
        visible: bool,
        home: Home,
        world: int,
    ) -> None:
        self.core = core
        self.exchange = exchange
        self.units = units
        self.visible = visible
        self.stays = home is Home.HOST
        self.early = prefetch if world > 1 and not self.stays else 0
        # What is sent for has been read before: reading is one unit further ahead.
        self.reading = 0 if home is not Home.DISK else prefetch + 1 if self.early else prefetch
        self.ahead: list[int] = []
        """Units held for a use that is still to come."""
        self.orders = {True: GatherOrder(), False: GatherOrder()}
        self.training = True

    def start_pass(self, training: bool) -> None:
        """Begins a forward with gradients (`training`) or without."""
        self._drop(self.ahead)
        self.training = training
        self.orders[training].start()

    def gather(self, unit: Unit) -> None:
        """Makes the unit's parameters usable; starts gathering and reading the ones that come next. Idempotent."""
        order = self.orders[self.training]
        if not order.seen or order.seen[-1] != unit.index:
            order.note(unit.index)
        wanted = self._wanted(order, unit) if self.early else ()
        if self.ahead:
            self._make_way(unit, wanted)
        self.exchange.gather(unit)
        unit.show()
        for index in wanted:
            if index not in self.ahead:
                if not self.exchange.gather_ahead(self.units[index]):
                    break
                self.ahead.append(index)
        for index in order.ahead(self.reading) if self.reading else ():
            self.core.prefetch(index)

    def _wanted(self, order: GatherOrder, unit: Unit) -> list[int]:
        """The units to be held ahead: those that come next and are not in use."""
        wanted: list[int] = []
        for index in order.rest():
            if len(wanted) == self.early:
                break
            released = self.units[index].state is UnitState.RELEASED
            if released and index != unit.index and index not in wanted:
                wanted.append(index)
        return wanted

    def _make_way(self, unit: Unit, wanted: Iterable[int]) -> None:
        """What is held ahead and does not come next is let go, and more where the unit would have no room."""
        if unit.index in self.ahead:
            self.ahead.remove(unit.index)
        self._drop([index for index in self.ahead if index not in wanted])
        while self.ahead and unit.state is UnitState.RELEASED and not self.core.has_room(unit.index):
            self._drop(self.ahead[-1:])

    def _drop(self, indices: list[int]) -> None:
        for index in list(indices):
            self.ahead.remove(index)
            self.exchange.release(self.units[index])

    def release(self, unit: Unit) -> None:
        """Ends the use of the unit's parameters. Idempotent."""
        if unit.index in self.ahead:
            self.ahead.remove(unit.index)
        if not self.stays:
            unit.hide()
        self.exchange.release(unit)

    def settle(self) -> None:
        """Weights are about to change: nothing that was sent for may be taken for the new ones."""
        self._drop(self.ahead)
        self.exchange.settle()

    def show_all(self) -> None:
        """Lets parameters that are visible at all times show their values for the first time."""
        for unit in self.units if self.visible else ():
            self.gather(unit)
            self.release(unit)
            unit.note_versions()

    def release_all(self) -> None:
        """Ends the use of every unit."""
        self.ahead.clear()
        for unit in self.units:
            if not self.visible:
                unit.hide()
        for unit in self.units:
            self.exchange.release(unit)
