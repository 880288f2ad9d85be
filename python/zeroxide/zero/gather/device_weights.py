"""Weights on a device that computes: copies of what the core has under its windows, for as long as they are used.

Whatever brings a unit together in host memory (`weight_gather.py`) stays as it is; from there it goes up on a stream of
its own, ahead of use where the order of the last pass tells what comes next. The model's stream waits for the copy, and
the host for nothing. Two lives:

- `TransientWeights`: the device has a unit's memory from its gather to its release, and a new use copies it again.
  Where somebody keeps views of it, it stays until they are gone. Weights that travel as integers go up as such where
  the device has kernels that make weights of them.
- `ResidentWeights`: the device has all weights at all times, and every update is followed by one copy up.

Memory is taken and given back on the stream up, so that a copy may get what was released before: it waits until the
model's stream has passed that release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from zeroxide.device.transfers import Transfers
from zeroxide.kernels import Launcher
from zeroxide.kernels.quantise import BLOCK, Quantised, dequantise, expander_for
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan
from zeroxide.precision.bits import bytes_of
from zeroxide.zero.gather.quantised import BITS, QuantisedWeights
from zeroxide.zero.gather.weight_gather import GatheredWeights, SingleRankWeights, WeightGather
from zeroxide.zero.passes import UnitState
from zeroxide.zero.unit import Unit
from zeroxide.zero.unit_memory import DeviceMemory

__all__ = ["DeviceWeights", "ResidentWeights", "TransientWeights", "make_device_weights", "memory_of"]


class DeviceWeights:
    """What both lives have in common.

    host: what brings a unit under its window. transfers: what copies it up.
    """

    def __init__(self, host: WeightGather, transfers: Transfers) -> None:
        self.host = host
        self.transfers = transfers
        self._arriving: dict[int, tuple[torch.Event, set[int]]] = {}
        """Of units that have been sent up, the event of their copy, and the streams that have waited for it."""

    @property
    def sent_bytes(self) -> int:
        """See `WeightGather`."""
        return self.host.sent_bytes

    @property
    def sent_across(self) -> int:
        """See `WeightGather`."""
        return self.host.sent_across

    def cover(self, unit: Unit) -> None:
        """See `WeightGather`."""
        self.host.cover(unit)

    @contextmanager
    def writing(self, unit: Unit, positions: Sequence[int]) -> Iterator[None]:
        """Makes what the device has at some positions the core's, too; inside, the unit is under its window."""
        memory = memory_of(unit)
        self.transfers.wait_up()
        self.host.gather(unit)
        try:
            for position in positions:
                memory.host_bytes(position).copy_(bytes_of(memory.views[position]))
            yield
        finally:
            self.host.release(unit)

    def _send_up(self, unit: Unit, coded: Sequence[torch.Tensor] | None = None) -> None:
        """The unit is under its window; what is not copied in place may leave it at once. coded: what is there as
        messages."""
        memory, after = memory_of(unit), None
        if memory.is_empty:
            self.transfers.allocate(memory.storage, memory.nbytes, unit.name)
        else:
            after = self._last_use(unit)
        if coded is None:
            event = self.transfers.send_up(memory.window, memory.flat, after)
        else:
            event = self.transfers.send_up_parts(coded, _Expansion(unit), unit.name, after)
        self._arriving[unit.index] = event, set()

    def _last_use(self, unit: Unit) -> torch.Event | None:
        """Up to which event what the device has of the unit may be in use."""
        return self.transfers.mark()

    def _join(self, unit: Unit) -> None:
        """Lets what the caller's stream is given from here on find the unit's values."""
        arriving = self._arriving.get(unit.index)
        if arriving is not None:
            event, waiting = arriving
            stream = self.transfers.stream()
            if stream.stream_id not in waiting:
                waiting.add(stream.stream_id)
                stream.wait_event(event)

    def refresh(self, units: Sequence[Unit] | None = None) -> None:
        """Values of some units, or of all, have changed by another way than a step, since the last `drain`: parameters
        that always show theirs show the new ones."""


def memory_of(unit: Unit) -> DeviceMemory:
    """The unit's memory on the device that it was made for."""
    assert isinstance(unit.memory, DeviceMemory), "made for this device by `Unit`"
    return unit.memory


def _expander(unit: Unit) -> Launcher | None:
    return expander_for(memory_of(unit).flat, BITS, unit.flat.dtype)


class _Expansion:
    """Writes the weights of a unit on the device, a rank's part at a time, from messages that have come up.

    A message is block after block a bf16 scale and the codes of `BLOCK` elements.
    """

    def __init__(self, unit: Unit) -> None:
        self._values = memory_of(unit).flat.view(unit.flat.dtype)
        launcher = _expander(unit)
        assert launcher is not None, "whoever asked for messages has looked"
        self._launcher = launcher

    def __call__(self, number: int, message: torch.Tensor) -> None:
        """message: of part `number`, on the device."""
        rows = message.view(-1, torch.bfloat16.itemsize + BLOCK * BITS // 8)
        scales = rows[:, : torch.bfloat16.itemsize].contiguous().view(torch.bfloat16)
        codes = rows[:, torch.bfloat16.itemsize :].contiguous().view(torch.int8)
        size = codes.numel()
        part = self._values[number * size : (number + 1) * size]
        dequantise(self._launcher, Quantised(BITS, codes.view(-1), scales.view(-1), size), part.dtype, out=part)


class TransientWeights(DeviceWeights):
    """Weights that are on the device only while they are used. Every use is announced, in order, on all ranks.

    follows: whether the host must first receive parts of a unit that other ranks send: then it goes up when the unit
    before it is released, while the device still computes with that.
    """

    def __init__(self, host: WeightGather, transfers: Transfers, *, follows: bool) -> None:
        super().__init__(host, transfers)
        self._follows = follows
        self._held: dict[int, Unit] = {}
        """Units in use, or about to be."""
        self._viewed: dict[int, Unit] = {}
        """Units that are not, and whose memory somebody has views of."""
        self._fresh: set[int] = set()
        """Of these, the ones whose values are those of the core."""
        self._coming: dict[int, Unit] = {}
        """Units that the host has begun to bring, and that nobody has sent up."""

    def gather(self, unit: Unit) -> None:
        """Makes the unit's values usable by what the model's stream is given next. Idempotent."""
        if unit.index not in self._held:
            self._start(unit)
        self._join(unit)

    def gather_ahead(self, unit: Unit) -> bool:
        """Begins to bring the unit."""
        if self._viewed:
            self._free_unviewed()
        if unit.index in self._held or unit.index in self._coming:
            return True
        if self._follows:
            if not self.host.gather_ahead(unit):
                return False
            self._coming[unit.index] = unit
        else:
            self._start(unit)
        return True

    def _start(self, unit: Unit) -> None:
        self._coming.pop(unit.index, None)
        if unit.index not in self._fresh or self._follows:
            # What this rank still has, others may not: they all gather.
            coded = self._gather_on_host(unit)
            try:
                if unit.index not in self._fresh:
                    self._send_up(unit, coded)
            finally:
                self.host.release(unit)
        if self._viewed.pop(unit.index, None) is not None:
            # Whoever has the views waits for nothing.
            self._join(unit)
        self._fresh.discard(unit.index)
        self._held[unit.index] = unit

    def _gather_on_host(self, unit: Unit) -> list[torch.Tensor] | None:
        """Has the host gather the unit; its messages, where the device makes weights of them."""
        if isinstance(self.host, QuantisedWeights) and _expander(unit) is not None:
            return self.host.gather_coded(unit)
        self.host.gather(unit)
        return None

    def release(self, unit: Unit) -> None:
        """Gives the unit's memory back, once the device has done what it was given. Idempotent."""
        if unit.index in self._held:
            self._free(unit)
            if self._viewed:
                self._free_unviewed()
            for each in list(self._coming.values()):
                self._start(each)
        elif self._coming.pop(unit.index, None) is not None:
            self.host.release(unit)

    def _free(self, unit: Unit) -> None:
        del self._held[unit.index]
        # A copy that nobody has waited for is still writing.
        self._join(unit)
        self._arriving.pop(unit.index, None)
        memory = memory_of(unit)
        if memory.is_viewed():
            self._viewed[unit.index] = unit
            self._fresh.add(unit.index)
        else:
            self.transfers.free(memory.storage)

    def _free_unviewed(self) -> None:
        for unit in [each for each in self._viewed.values() if not memory_of(each).is_viewed()]:
            del self._viewed[unit.index]
            self._fresh.discard(unit.index)
            self.transfers.free(memory_of(unit).storage)

    def drain(self) -> None:
        """What the device has is about to be old, and host memory about to change."""
        for unit in list(self._held.values()):
            self._free(unit)
        for unit in list(self._coming.values()):
            self.release(unit)
        self._fresh.clear()
        self.transfers.wait_up()
        self.host.drain()

    def after_step(self) -> None:
        """See `WeightGather`. Views that somebody keeps show the new values, but where other ranks had to send them."""
        self.host.after_step()
        for unit in [] if self._follows else list(self._viewed.values()):
            self.gather(unit)
            self.release(unit)


class ResidentWeights(DeviceWeights):
    """Weights that the device has at all times.

    shown: whether parameters always show their values; they go up right after a step, otherwise when they are used
    first. at_home: numbers of units whose weights are at home here: the host has none of them, and nothing goes up.
    check: refuses them where a step has failed half way, as the core refuses its own.
    """

    def __init__(
        self,
        host: WeightGather,
        transfers: Transfers,
        units: Sequence[Unit],
        *,
        shown: bool,
        at_home: frozenset[int],
        check: Callable[[], None],
    ) -> None:
        super().__init__(host, transfers)
        self._at_home = at_home
        self._check = check
        self._units = units
        self._shown = shown
        self._frozen = {unit.index for unit in units if not unit.num_trainable}
        self._fresh: set[int] = set()
        """Units whose values on the device are those of the core, or will be when their copy has arrived."""
        self._before: set[int] = set()
        """Those that were, when the core's were last about to change."""
        self._stepping = False
        """Whether the units that go up have just been updated, and nobody has had the time to look at them."""
        self._used: torch.Event | None = None
        """On the model's stream at that time, until the stream up has waited for it: nothing uses old values later."""

    def gather(self, unit: Unit) -> None:
        """Makes the unit's values usable by what the model's stream is given next. Idempotent."""
        if unit.index in self._at_home:
            self._check()
        self.gather_ahead(unit)
        self._join(unit)

    def gather_ahead(self, unit: Unit) -> bool:
        """Sends the unit up, if it has been updated since."""
        if not self._is_fresh(unit):
            self.host.gather(unit)
            try:
                self._send_up(unit)
            finally:
                self.host.release(unit)
            self._fresh.add(unit.index)
        return True

    def _is_fresh(self, unit: Unit) -> bool:
        return unit.index in self._fresh or unit.index in self._at_home

    def changed(self, units: Iterable[int]) -> None:
        """Weights at home here are other ones from here on, for the caller's stream: others wait for that."""
        stream = self.transfers.stream()
        # One wait of a stream is for all of them.
        arriving = self.transfers.mark(), {stream.stream_id}
        self._arriving.update(dict.fromkeys(units, arriving))

    @contextmanager
    def writing(self, unit: Unit, positions: Sequence[int]) -> Iterator[None]:
        """See `DeviceWeights`: what is at home here has been written where it is."""
        if unit.index in self._at_home:
            yield
            return
        with super().writing(unit, positions):
            yield

    def release(self, unit: Unit) -> None:
        """The memory stays."""

    def drain(self) -> None:
        """See `WeightGather`."""
        self.transfers.wait_up()
        self._before, self._fresh = self._fresh, set()
        self._used = self.transfers.mark()
        self.host.drain()

    def _last_use(self, unit: Unit) -> torch.Event | None:
        """See `DeviceWeights`: what goes up need not wait for what is computed with new values meanwhile, nor for the
        update of units at home here, unless somebody may have looked at the old ones since."""
        if self._is_looked_at(unit) and not self._stepping:
            return super()._last_use(unit)
        used, self._used = self._used, None
        return used

    def after_step(self) -> None:
        """See `WeightGather`. With one rank a unit goes up while the host updates the next one."""
        one_by_one = isinstance(self.host, SingleRankWeights)
        if not one_by_one:
            self.host.after_step()
        # What no step updates is as it was.
        self._fresh |= self._before & self._frozen
        sent = [each for each in self._units if not self._is_fresh(each) and (self._shown or self._is_looked_at(each))]
        self._stepping = True
        try:
            for unit in sent:
                self.gather_ahead(unit)
        finally:
            self._stepping = False
        if one_by_one:
            self.host.after_step()
        self._join_last(sent)

    def refresh(self, units: Sequence[Unit] | None = None) -> None:
        """See `DeviceWeights`: what is always shown lies under its window at all times."""
        if units is not None:
            self._fresh |= self._before - {unit.index for unit in units}
        if self._shown:
            sent = [unit for unit in self._units if not self._is_fresh(unit)]
            for unit in sent:
                self._send_up(unit)
                self._fresh.add(unit.index)
            self._join_last(sent)

    @staticmethod
    def _is_looked_at(unit: Unit) -> bool:
        return unit.state is UnitState.GATHERED or memory_of(unit).is_viewed()

    def _join_last(self, sent: Sequence[Unit]) -> None:
        """Joins all units that have been sent up, in this order: one copy follows another."""
        if sent:
            self._join(sent[-1])


def make_device_weights(
    host: WeightGather, transfers: Transfers, plan: Plan, units: Sequence[Unit], check: Callable[[], None]
) -> TransientWeights | ResidentWeights:
    """What brings the weights of `units`, which `host` brings under their windows, to the device of `plan`.

    Windows that are the weights' home never move: the device copies from them in place, if it can. `check` refuses
    weights that are the state of two steps.
    """
    if plan.weights is Home.HOST:
        for unit in [each for each in units if each.index not in plan.units_on_device]:
            transfers.register(memory_of(unit).window, unit.name)
    if plan.transient:
        return TransientWeights(host, transfers, follows=isinstance(host, GatheredWeights))
    shown, at_home = plan.params_always_full, plan.units_on_device
    return ResidentWeights(host, transfers, units, shown=shown, at_home=at_home, check=check)
