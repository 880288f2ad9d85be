"""Weights that travel as block-wise int8: between groups of ranks once an update, within a group for every use.

ZeRO++ (Wang et al. 2023). Every rank quantises its part once after an update and keeps the codes. Ranks with the same
place in their groups exchange them (the first hop, which alone crosses groups); from then on a group has the codes of
all weights, a share on each of its ranks: the secondary partition, from which backward, later micro-batches and
evaluation gather within the group (the second hop). What is computed with is what the codes stand for, the rank's own
part included, so that all ranks compute with the same weights. The exact weights stay where they are at home.

A message is received at the end of the place under the window where its elements belong, and brought back in place. On
a device with kernels that is left to the device: messages go up as they are, half the bytes, and the window keeps them
until somebody wants elements there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from zeroxide import _core
from zeroxide.device.placement import DTYPE_NAMES, memory_at, spec
from zeroxide.plan.plan import Plan
from zeroxide.zero.gather.weight_gather import CollectiveWeights
from zeroxide.zero.messages import Messages, Work
from zeroxide.zero.unit import Unit

__all__ = ["BITS", "QuantisedWeights"]

BITS = 8


class _Weights(Protocol):
    """What a gathering needs of the engine's weights."""

    messages: Messages
    exchanged: set[int]
    packed: dict[int, _Gathering]


class _Gathering:
    """A unit's codes on their way, in one hop or two. It is waited for as `Work` is."""

    def __init__(self, weights: _Weights, unit: Unit, room: torch.Tensor, codes: torch.Tensor) -> None:
        self.weights = weights
        self.unit = unit
        self.hops = hops = unit.groups.weight_hops()
        self.dtype = DTYPE_NAMES[room.dtype]
        self.parts = room.view(torch.uint8).view(len(hops.ranks), -1)
        """The elements of each rank's part, as bytes."""
        self.codes = codes.view(hops.far.size, -1)
        """The messages that this rank keeps for its group, of the parts of `column`."""
        self.column = [hops.ranks.index(rank) for rank in hops.far.ranks]
        self.across: Work | None = None
        self.within: Work | None = None
        self.arrived = False
        self.stays_packed = False
        """Whether what has arrived is left as it came."""

    def start(self, across: Work | None, within: Work) -> tuple[int, int]:
        """Begins the first hop, or the second where there is none. Returns the bytes that leave the rank's group, and
        those that stay within it."""
        self.across, self.within = across, within
        far, near = self.hops.far, self.hops.near
        exchanged = self.weights.exchanged
        if self.unit.index not in exchanged:
            own = self.parts[self.column[far.position]]
            _core.quantise_message(spec(own), self.dtype, BITS, spec(self.codes[far.position]))
        if across is None:
            exchanged.add(self.unit.index)
            self._start_within()
        else:
            own_codes = self.codes[far.position]
            others = far.others()
            self.weights.messages.start(
                across,
                [(rank, self.codes[position]) for position, rank in others],
                [(rank, own_codes) for _, rank in others],
            )
        message = self.codes.shape[1]
        sent = message * (far.size - 1) if across is not None else 0
        return sent, message * far.size * (near.size - 1)

    def _start_within(self) -> None:
        assert self.within is not None
        others = self.hops.near.others()
        message = self.codes.shape[1]
        incoming = [
            (rank, self.parts[self.hops.ranks.index(source), -message:])
            for place, rank in others
            for source in self.hops.column(place)
        ]
        outgoing = [(rank, codes) for _, rank in others for codes in self.codes.unbind()]
        self.weights.messages.start(self.within, incoming, outgoing)

    def advance(self) -> None:
        """Begins the second hop if the first has ended. Ranks may come to that at different times: each message has the
        tag of its hop."""
        across = self.across
        if across is not None and not self._within_begun() and all(each.is_completed() for each in across.arriving):
            self._end_across(across)

    def _within_begun(self) -> bool:
        return self.within is not None and self.within.begun

    def _end_across(self, across: Work) -> None:
        across.received()
        self.weights.exchanged.add(self.unit.index)
        self._start_within()

    def received(self) -> None:
        """Waits until everything has arrived, and brings it back, unless it stays as it came. Raises RanksError when a
        rank is lost."""
        if self.arrived:
            return
        assert self.within is not None
        if self.across is not None and not self._within_begun():
            self._end_across(self.across)
        self.within.received()
        self.arrived = True
        if self.stays_packed:
            self.weights.packed[self.unit.index] = self
        else:
            self.expand()

    def coded(self) -> list[torch.Tensor]:
        """What has arrived, and this rank's own: the message of each rank's part, in the order of the parts."""
        message = self.codes.shape[1]
        return [
            self.codes[self.column.index(at)] if at in self.column else part[-message:]
            for at, part in enumerate(self.parts.unbind())
        ]

    def expand(self) -> None:
        """Makes elements of what has arrived, in place."""
        for at, part in enumerate(self.parts.unbind()):
            if at in self.column:
                codes = self.codes[self.column.index(at)]
                _core.dequantise_message(spec(codes), BITS, spec(part), self.dtype)
            else:
                _core.expand_message(spec(part), self.dtype, BITS)

    def sent(self) -> None:
        """Waits until everything has left. Raises RanksError when a rank is lost."""
        if self.across is not None:
            self.across.sent()
        if self.within is not None:
            self.within.sent()


class QuantisedWeights(CollectiveWeights):
    """`CollectiveWeights` some or all of which travel as int8, at stage 3 with shards in host memory."""

    def __init__(self, core: _core.Offload, messages: Messages, units: Iterable[Unit], plan: Plan) -> None:
        super().__init__(core, messages, stays=False, refreshed=(), params_always_full=False)
        self.exchanged: set[int] = set()
        """Units of whose present weights this rank has the codes that it keeps for its group."""
        self.packed: dict[int, _Gathering] = {}
        """Units whose parts are under their windows as messages: elements to the core, which does not look at them."""
        room = memory_at(*core.room("codes"), torch.uint8)
        places = zip(units, plan.numbers.codes, strict=True)
        self._codes = {unit.index: room[start : start + size] for unit, (start, size) in places if size}

    def gather(self, unit: Unit) -> None:
        """As in the base class. What was sent for ahead goes on meanwhile."""
        with self._busy:
            self._advance()
            super().gather(unit)
            packed = self.packed.pop(unit.index, None)
            if packed is not None:
                packed.expand()

    def gather_coded(self, unit: Unit) -> list[torch.Tensor] | None:
        """As `gather`, for somebody who takes messages: that of each rank's part, in the order of the parts. None where
        the unit's elements are under its window. The messages stay until its release."""
        with self._busy:
            self._advance()
            index = unit.index
            if index in self._flights or not self.core.gather(index, self._has_readers(unit)):
                if index not in self._flights:
                    self._start(unit)
                flight = self._flights[index]
                # What is received beside its window moves when it is complete.
                if isinstance(flight, _Gathering) and index in self._coming and index not in self._unseen:
                    flight.stays_packed = True
                self._receive(index)
            packed = self.packed.get(index)
            return None if packed is None else packed.coded()

    def _advance(self) -> None:
        for gathering in self._flights.values():
            if isinstance(gathering, _Gathering):
                gathering.advance()

    def drain(self) -> None:
        """Weights are about to change: codes of the old ones are of no use from here on."""
        super().drain()
        self.exchanged.clear()

    def _start(self, unit: Unit) -> None:
        self.packed.pop(unit.index, None)
        codes = self._codes.get(unit.index)
        if codes is None:
            super()._start(unit)
            return
        gathering = _Gathering(self, unit, self._room(unit), codes)
        crosses = gathering.hops.far.size > 1 and unit.index not in self.exchanged
        across = self.messages.work("all-gather across groups", unit) if crosses else None
        within = self.messages.work("all-gather", unit)
        # Known before its first message is on its way, as in the base class.
        self._flights[unit.index] = gathering
        self._coming.add(unit.index)
        sent, stayed = gathering.start(across, within)
        self.sent_across += sent
        self.sent_bytes += sent + stayed
