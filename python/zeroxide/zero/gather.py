"""Gathering ahead of use: the order of one pass is what the next one is prefetched by."""

from __future__ import annotations

from zeroxide import _core
from zeroxide.zero.exchange import Exchange
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


class Gatherer:
    """Brings units where they are used. The one place that knows compute memory to be host memory.

    For another device the gather ends with a copy from the unit's home into a device buffer; hooks and engine only
    see `gather` and `release`.

    `visible`: parameters show their values at all times. `stays`: the memory under them holds the values at all times,
    so that they are hidden once, at the end of a pass, and not shown again in between.
    """

    def __init__(
        self,
        core: _core.Offload,
        exchange: Exchange,
        units: list[Unit],
        prefetch: int,
        *,
        visible: bool,
        stays: bool,
    ) -> None:
        self.core = core
        self.exchange = exchange
        self.units = units
        self.prefetch = prefetch
        self.visible = visible
        self.stays = stays
        self.orders = {True: GatherOrder(), False: GatherOrder()}
        self.training = True

    def start_pass(self, training: bool) -> None:
        """Begins a forward with gradients (`training`) or without."""
        self.training = training
        self.orders[training].start()

    def gather(self, unit: Unit) -> None:
        """Makes the unit's parameters usable; starts reading the ones that come next. Idempotent."""
        order = self.orders[self.training]
        if not order.seen or order.seen[-1] != unit.index:
            order.note(unit.index)
        self.exchange.gather(unit)
        unit.show()
        for index in order.ahead(self.prefetch):
            self.core.prefetch(index)

    def release(self, unit: Unit) -> None:
        """Ends the use of the unit's parameters. Idempotent."""
        if not self.stays:
            unit.hide()
        self.core.release(unit.index)

    def show_all(self) -> None:
        """Lets parameters that are visible at all times show their values for the first time."""
        for unit in self.units if self.visible else ():
            self.gather(unit)
            self.release(unit)
            unit.note_versions()

    def release_all(self) -> None:
        """Ends the use of every unit."""
        for unit in self.units:
            if not self.visible:
                unit.hide()
            self.core.release(unit.index)
