"""Gathering ahead of use: the order of one pass is what the next one is prefetched by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from zeroxide import _core
from zeroxide.errors import ModelError
from zeroxide.plan.home import Home
from zeroxide.zero.gather.weight_gather import WeightGather
from zeroxide.zero.passes import UnitState
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
    """Brings units where they are used, and lets them go again. Where compute memory is, `device/placement.py` knows.

    `params_always_full`: parameters show their values at all times. `home`: where weights are between uses. In host
    memory, the
    memory under them holds the values at all times, and with one rank a read brings them where it does not: parameters
    are then hidden once, at the end of a pass, and not shown again in between. Elsewhere up to `prefetch` units that
    come next are held and sent for while the present one is used; all ranks choose the same ones, by the order of the
    last pass.

    transient: whether they are on a device, which has memory for a unit only while it is used.

    A unit that is used though no hook has announced it is a guest: it stays until the pass ends or its room is needed.
    """

    def __init__(
        self,
        core: _core.Offload,
        weights: WeightGather,
        units: Sequence[Unit],
        prefetch: int,
        *,
        params_always_full: bool,
        home: Home,
        world: int,
        transient: bool = False,
    ) -> None:
        self.core = core
        self.weights = weights
        self.units = units
        self.params_always_full = params_always_full
        self.home = home
        self.alone = world == 1
        """Whether no other rank takes part in what this one gathers and reduces."""
        self.serves = not transient
        """Whether a read of weights that are not there is noticed."""
        self.moves = transient or home is not Home.HOST
        """Whether what was written into weights is lost with their memory when their use ends."""
        self.stays = not transient and (home is Home.HOST or world == 1)
        self.early = prefetch if not self.stays else 0
        self.keeps_next = transient and world == 1
        """Whether a unit whose use ends, and that comes next, too, is held for that. Ranks gather it anew."""
        # What is sent for has been read before: reading is one unit further ahead.
        self.reading = 0 if home is not Home.DISK else prefetch + 1 if self.early else prefetch
        self.ahead: list[int] = []
        """Units held for a use that is still to come."""
        self.guests: list[Unit] = []
        self.used: dict[int, Unit] = {}
        """Units in use, those gathered first at the front; kept where their room may be needed."""
        self.before_release: Callable[[Unit], None] | None = None
        """Looks at a unit whose use ends, while its parameters still show their values."""
        self.orders = {True: GatherOrder(), False: GatherOrder()}
        self.training = True
        self.in_backward = False

    def start_pass(self, training: bool) -> None:
        """Begins a forward with gradients (`training`) or without."""
        self._drop(self.ahead)
        self.release_guests()
        self.training = training
        self.orders[training].start()

    def gather(self, unit: Unit, beside: Sequence[Unit] = ()) -> None:
        """Makes the unit's parameters usable; starts gathering and reading the ones that come next. Idempotent.

        beside: units that are needed at the same time.
        """
        order = self.orders[self.training]
        # Which experts are used is another each time: none is brought because the last pass used it.
        if not unit.routed and (not order.seen or order.seen[-1] != unit.index):
            order.note(unit.index)
        wanted = self._wanted(order, unit) if self.early else ()
        if self.ahead:
            self._make_way(unit, wanted)
        if not self.stays:
            self._make_room([*beside, unit])
        elif self.home is Home.DISK:
            self._choose_who_gives_way(unit)
        self.weights.gather(unit)
        unit.show()
        for index in wanted:
            if index not in self.ahead:
                if not self.weights.gather_ahead(self.units[index]):
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
            again = index == unit.index
            if (self.keeps_next if again else index not in self.used) and index not in wanted:
                wanted.append(index)
        return wanted

    def _make_way(self, unit: Unit, wanted: Iterable[int]) -> None:
        """What is held ahead and does not come next is let go, and more where the unit would have no room."""
        if unit.index in self.ahead:
            self.ahead.remove(unit.index)
        self._drop([index for index in self.ahead if index not in wanted])
        while self.ahead and unit.index not in self.used and not self.core.has_room(unit.index):
            self._drop(self.ahead[-1:])

    def _drop(self, indices: list[int]) -> None:
        for index in list(indices):
            self.ahead.remove(index)
            self.weights.release(self.units[index])

    def use(self, units: Sequence[Unit]) -> None:
        """Makes the parameters of units usable that no hook has announced, all at once, as guests."""
        for unit in units:
            if unit.index in self.used and unit.state is UnitState.GATHERED:
                continue
            self.gather(unit, beside=units)
            if unit not in self.guests:
                self.guests.append(unit)

    def bring(self, unit: Unit) -> None:
        """Brings weights to a reader that nothing announced, in the middle of its operation; every rank does.

        Nothing but memory changes hands: parameters show what they showed, whether their weights are there or not.
        """
        if not unit.routed:
            self.orders[self.training].note(unit.index)
        if unit.index in self.ahead:
            self.ahead.remove(unit.index)
        while self.ahead and not self.core.has_room(unit.index):
            self._drop(self.ahead[-1:])
        while not self.core.has_room(unit.index) and self._give_way(unit):
            pass
        self.used.pop(unit.index, None)
        self.used[unit.index] = unit
        self.weights.gather(unit)
        if unit not in self.guests:
            self.guests.append(unit)

    def _make_room(self, units: Sequence[Unit]) -> None:
        """Ends the use of those gathered first, guests before others, until the last of `units` has room, if it can be
        beside the rest of them. Whoever still needs one that had to go gathers it again.
        """
        unit = units[-1]
        if unit.index not in self.used:
            needed = {each.index for each in units}
            while not self.core.has_room(unit.index):
                others = [each for each in (*self.guests, *self.used.values()) if each.index not in needed]
                if others:
                    self.release(others[0])
                elif not self._give_way(unit):
                    break
        self.used.pop(unit.index, None)
        self.used[unit.index] = unit

    def _choose_who_gives_way(self, unit: Unit) -> None:
        """With one rank the core takes the memory of units in use itself: what was written into them counts before."""
        if unit.index not in self.used:
            while not self.core.has_room(unit.index) and self._give_way(unit):
                pass
        self.used.pop(unit.index, None)
        self.used[unit.index] = unit

    def _give_way(self, unit: Unit) -> bool:
        """Takes the memory of what was gathered first and is in use: reads bring it back. False where nothing is."""
        oldest = next((each for each in self.used.values() if each is not unit), None)
        if oldest is None:
            return False
        # What an operation has just read stays.
        if self.before_release is not None and oldest.state is UnitState.GATHERED:
            self.before_release(oldest)
        del self.used[oldest.index]
        self.weights.release(oldest)
        return True

    def release(self, unit: Unit) -> None:
        """Ends the use of the unit's parameters. Idempotent."""
        # What comes next is this unit again.
        kept = unit.index in self.ahead and unit.index in self.used
        if unit.index in self.ahead and not kept:
            self.ahead.remove(unit.index)
        if self.guests and unit in self.guests:
            self.guests.remove(unit)
        if self.before_release is not None and self.moves and unit.state is UnitState.GATHERED:
            # Elsewhere what was written is lost with the memory.
            self.before_release(unit)
        self.used.pop(unit.index, None)
        if not self.stays and not self.in_backward:
            unit.hide()
        elif not self.serves:
            unit.outline()
        if not kept:
            self.weights.release(unit)

    def release_guests(self) -> None:
        """Ends the use of what no hook will."""
        for unit in list(self.guests):
            self.release(unit)

    def drain(self) -> None:
        """Weights are about to change: nothing that was sent for may be taken for the new ones, and nobody uses the old
        ones."""
        if self.guests:
            self.release_all()
        self._drop(self.ahead)
        self.weights.drain()
        for unit in () if self.stays or self.params_always_full else self.units:
            self.weights.cover(unit)

    def show_all(self) -> None:
        """Lets parameters that always show their values show their values for the first time."""
        for unit in self.units if self.params_always_full else ():
            self.gather(unit)
            self.release(unit)
            unit.note_versions()

    def begin_backward(self) -> None:
        """Until the pass ends parameters show the memory of their values, gathered or not: autograd may have saved them
        as they are, and would compute with tensors of size 0. A read of what is not gathered brings it, or is refused
        by name. On a device nothing notices a read: there parameters that are not gathered have their shapes alone, an
        operation asks them for their values, and what autograd has saved is brought by itself.
        """
        self.in_backward = True
        self.show_what_may_be_read()

    def show_what_may_be_read(self) -> None:
        """Lets parameters of units that are not gathered be what autograd may have saved, as `begin_backward` says."""
        for unit in self.units:
            if self.serves:
                unit.show()
            elif unit.state is not UnitState.GATHERED:
                unit.outline()

    def release_all(self, *, hide: bool = True) -> None:
        """Ends the use of every unit. With `hide` False, parameters that can be read at any time show values still."""
        self.in_backward = False
        self.ahead.clear()
        self.guests.clear()
        self.used.clear()
        failed: ModelError | None = None
        for unit in self.units:
            if self.before_release is not None and unit.state is UnitState.GATHERED:
                try:
                    self.before_release(unit)
                except ModelError as error:
                    failed = failed or error
            if not self.params_always_full and (hide or not self.stays):
                unit.hide()
        for unit in self.units:
            self.weights.release(unit)
        if failed is not None:
            raise failed
