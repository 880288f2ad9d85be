"""Gradients from the device that computes into the core, each copied down once, in the dtype that it has.

A gradient is copied on the stream down as soon as autograd has it, and backward goes on. The first of a step goes
straight to where the core keeps it, if the device can write there: neither backward nor the device waits for that, and
the host measures it when it has come. Everything else goes through page-locked blocks, from which the core takes it,
and while none of them is free backward waits. A unit's gradients are all in the core before anything is sent to other
ranks: that is done when the next unit is complete, at points that depend on the order of the pass alone, so that all
ranks send alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from zeroxide import _core
from zeroxide.device.placement import memory_at, plain, spec
from zeroxide.device.transfers import BLOCK_BYTES, Download, Transfers
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan
from zeroxide.zero.on_device.state import StateOnDevice
from zeroxide.zero.reduce.gradient_reduction import GradientReduction
from zeroxide.zero.reduce.sent import SentGradients
from zeroxide.zero.unit import Unit

__all__ = ["GradientOffload", "OffloadedReduction", "kept_where_they_arrive"]


def kept_where_they_arrive(plan: Plan, units: Iterable[Unit]) -> list[Unit]:
    """The units whose gradients are: with several ranks they are summed first, and with state on disk their memory is
    given back after the update."""
    if plan.world > 1 or plan.state is not Home.HOST:
        return []
    return [unit for unit in units if unit.num_trainable and unit.index not in plan.units_on_device]


class GradientOffload:
    """Gradients on their way down, those that left first at the front. Those of units that are at home on the device
    stay there."""

    def __init__(self, core: _core.Offload, transfers: Transfers, on_device: StateOnDevice | None = None) -> None:
        self.transfers = transfers
        self._core = core
        self._dtype: torch.dtype | None = None
        """In which the core keeps gradients that go straight there."""
        self._straight: set[int] = set()
        """Numbers of the units whose gradients do."""
        self._on_device = on_device
        """What takes gradients of units that are at home on the device, which do not come down."""
        self._under_way: deque[tuple[Unit, int, int | None, Download]] = deque()
        """(unit, position, first element) of each, and what comes; None in place of an element where it comes whole to
        where it is kept."""

    def go_straight(self, units: Iterable[Unit], dtype: torch.dtype) -> None:
        """Has the device write gradients of units from now on where the core keeps them, in `dtype` and in memory that
        never moves, as far as that can be locked."""
        self._dtype = dtype
        for unit in units:
            memory = memory_at(*self._core.kept_gradients(unit.index), torch.uint8)
            if not self.transfers.register(memory, f"gradients of {unit.name}"):
                # The rest would be refused, too.
                return
            self._straight.add(unit.index)

    def take(self, unit: Unit, position: int, grad: torch.Tensor) -> None:
        """Begins to bring a gradient, dense and on the device, to where its unit is. Raises what the core raises."""
        flat = plain(grad).view(-1)
        if self._on_device is not None and self.keeps(unit):
            self._on_device.take(unit.index, position, flat)
            return
        if (home := self._place_for(unit, position, flat)) is not None:
            self._under_way.append((unit, position, None, self.transfers.bring_into(flat, home)))
            return
        size = BLOCK_BYTES // flat.itemsize
        for start in range(0, flat.numel(), size):
            while not self.transfers.has_free():
                self._add_first()
            download = self.transfers.bring_down(flat[start : start + size])
            self._under_way.append((unit, position, start, download))

    def _place_for(self, unit: Unit, position: int, flat: torch.Tensor) -> torch.Tensor | None:
        """Where the device is to put a gradient itself; None where that cannot be."""
        if unit.index not in self._straight or flat.dtype != self._dtype or not flat.numel():
            return None
        if any(each is unit and at == position for each, at, *_ in self._under_way):
            # Used twice in one backward: the second is added.
            self.drain()
        room = self._core.gradient_room(unit.index, position)
        return None if room is None else memory_at(*room, self._dtype)

    def keeps(self, unit: Unit) -> bool:
        """Whether gradients of the unit stay on the device."""
        return self._on_device is not None and unit.index in self._on_device.units

    def drain_unit(self, unit: Unit) -> None:
        """Everything of the unit is in the core, and with it what was taken before."""
        last = max((at for at, (each, *_) in enumerate(self._under_way) if each is unit), default=-1)
        for _ in range(last + 1):
            self._add_first()

    def drain(self) -> None:
        """Nothing is under way."""
        while self._under_way:
            self._add_first()

    def forget(self) -> None:
        """Drops what is under way, after a backward that failed."""
        while self._under_way:
            self.transfers.give_back(self._under_way.popleft()[-1])

    def _add_first(self) -> None:
        unit, position, start, download = self._under_way.popleft()
        try:
            values = self.transfers.values_of(download)
            if start is None:
                self._core.gradient_arrived(unit.index, position)
            else:
                self._core.accumulate(unit.index, position, start, spec(values), True)
        finally:
            self.transfers.give_back(download)


class OffloadedReduction:
    """Reduces units whose gradients have come down, one unit behind their completion."""

    def __init__(self, host: GradientReduction, grad_offload: GradientOffload) -> None:
        self.host = host
        self._grad_offload = grad_offload
        self._complete: Unit | None = None

    @property
    def sent(self) -> SentGradients:
        """See `GradientReduction`."""
        return self.host.sent

    def send(self, unit: Unit) -> None:
        """The unit's gradients have all been taken; those of the unit before it go out."""
        if self._complete is not unit:
            self._send_complete()
            self._complete = unit

    def reduce(self, unit: Unit) -> None:
        """See `GradientReduction`."""
        self._grad_offload.drain_unit(unit)
        self.host.reduce(unit)

    def end_backward(self) -> None:
        """See `GradientReduction`."""
        self._grad_offload.drain()
        self._send_complete()
        self.host.end_backward()

    def abandon(self) -> None:
        """See `GradientReduction`."""
        self._complete = None
        self._grad_offload.forget()
        self.host.abandon()

    def _send_complete(self) -> None:
        unit, self._complete = self._complete, None
        if unit is not None:
            self._grad_offload.drain_unit(unit)
            self.host.send(unit)
