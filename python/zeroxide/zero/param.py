"""Parameters of an engine, one by one: reading and changing values that lie in the ranks' shards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zeroxide import _core
from zeroxide.device.placement import spec
from zeroxide.distributed import Ranks, Watch
from zeroxide.errors import ModelError
from zeroxide.precision.bits import bytes_of, converted, copy_of, exact_in_fp32, fingerprint, why_not_bytes
from zeroxide.zero.empty import conceal
from zeroxide.zero.param_handle import keeper_of, manage, new_id
from zeroxide.zero.passes import UnitState, in_backward
from zeroxide.zero.unit import Unit

if TYPE_CHECKING:
    from zeroxide.zero.hooks import Hooks

__all__ = ["House", "Seat", "seat_all", "seat_of"]


class House:
    """What the parameters of one engine have in common."""

    def __init__(
        self,
        core: Callable[[], _core.Offload],
        before_change: Callable[[], None],
        units: list[Unit],
        ranks: Ranks,
        watch: Watch,
        *,
        replicated: bool,
        visible: bool,
        on_disk: bool,
    ) -> None:
        self.on_disk = on_disk
        """Whether weights are at home on disk, which does not see what is written into memory."""
        self.core = core
        self.before_change = before_change
        self.units = units
        self.ranks = ranks
        self.watch = watch
        self.replicated = replicated
        self.visible = visible
        self.hooks: Hooks | None = None
        """What gathers; None once the engine has ended."""
        self.handed_out: dict[Seat, int] = {}
        """Parameters whose `.data` somebody has taken, with the fingerprint of what it showed then."""
        self.watches_data = not visible and (on_disk or ranks.world > 1)
        """Whether what is written through `.data` would be lost, or be one rank's alone."""
        self.changes = 0
        """How often values of parameters have changed since the start."""

    @property
    def alone(self) -> bool:
        """Whether this rank has all values of everything."""
        return self.ranks.world == 1 or self.replicated

    def in_pass(self) -> bool:
        """Whether a forward or backward is under way, in which parameters are used where they are."""
        return self.hooks is not None and self.hooks.in_pass()

    def use(self, params: Sequence[torch.Tensor]) -> None:
        """Gathers the units of parameters that an operation needs. Every rank does. Raises ModelError after the end."""
        seats = [seat for param in params if (seat := seat_of(param)) is not None]
        if self.hooks is None:
            raise ModelError(
                f"{seats[0].name} was used after its engine was destroyed: at stage 3 the weights are gone with it; "
                "take engine.module_state_dict() or save before",
                name=seats[0].name,
            )
        if self.hooks.thread != threading.get_ident() and not in_backward():
            raise ModelError(
                f"{seats[0].name} was used by another thread than the one that runs the model, for which weights come "
                "and go: use copies, as state_dict() gives them between steps",
                name=seats[0].name,
            )
        self.hooks.use(list({seat.unit.index: seat.unit for seat in seats}.values()))

    def apart(self) -> AbstractContextManager[None]:
        """What an operation outside of a pass is done in, from `use` to `end_use`."""
        return nullcontext() if self.hooks is None else self.hooks.apart()

    def end_use(self, recorded: Sequence[torch.Tensor]) -> None:
        """Ends `use` outside of a pass; `recorded` are the results that autograd knows the way to."""
        if self.hooks is not None:
            self.hooks.end_use(recorded)

    def expect_gradient(self, param: torch.Tensor) -> None:
        """The parameter, empty, may be used in the pass by what gathers it later."""
        seat = seat_of(param)
        if seat is not None and seat.trainable and self.hooks is not None and torch.is_grad_enabled():
            self.hooks.accumulators.append(seat.unit.accumulator(seat.position))

    def own_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy of it where its memory is that of weights."""
        inside = any(unit.contains(tensor) for unit in self.units) and tensor.numel() > 0
        return tensor.clone() if inside and not isinstance(tensor, nn.Parameter) else tensor

    def take_over_edits(self, unit: Unit) -> None:
        """Looks at a unit whose use in a pass ends: what was written into its weights counts, or is refused by name.

        Raises ModelError where other ranks may have other values, and where a parameter's `.data` was replaced.
        """
        replaced = [position for position in unit.replaced() if not unit.undo_cast(position)]
        edited = unit.edits() + self.changed_by_hand(unit)
        if not edited and not replaced:
            return
        unit.note_versions()
        # To replace it is a change in place as well, to a version counter.
        what, name = ("replaced", unit.names[replaced[0]]) if replaced else ("changed in place", unit.names[edited[0]])
        if replaced or self.ranks.world > 1:
            for position in replaced:
                unit.params[position].data = unit.views[position]
            raise ModelError(
                f"the weight {name} was {what} while it was in use, which "
                + ("the engine cannot follow" if replaced else "other ranks know nothing of")
                + ": change it between steps, inside zeroxide.zero.GatheredParameters(params, modifier_rank=0)",
                name=name,
            )
        if self.on_disk:
            self.core().rewrite_weights(unit.index)

    def changed_by_hand(self, unit: Unit) -> list[int]:
        """Positions of parameters of the unit that were changed through their `.data` since that was taken."""
        if not self.handed_out:
            return []
        seats = [seat for seat in self.handed_out if seat.unit is unit and not seat.holds]
        return [seat.position for seat in seats if seat.changed_by_hand(seat.param)]

    def forget_by_hand(self) -> None:
        """Values change by the engine's own hand."""
        for seat in [each for each in self.handed_out if not each.holds]:
            del self.handed_out[seat]

    def barrier(self, name: str) -> None:
        """Until every rank is here."""
        with self.watch.waiting("a barrier", name):
            self.ranks.barrier()

    def broadcast(self, values: torch.Tensor, source: int, name: str) -> None:
        """Overwrites `values`, contiguous, with that rank's."""
        with self.watch.waiting("a broadcast", name):
            self.ranks.broadcast_tensor(values, source)


class Seat:
    """Keeps one parameter of an engine. `part` is "weights", "exp_avg", "exp_avg_sq" or "grad"; values are fp32.

    A frozen parameter is bytes to the core: its values are taken and given in its own dtype, as `live` ones.
    """

    def __init__(self, house: House, unit: Unit, position: int) -> None:
        self.house = house
        self.unit = unit
        self.position = position
        self.name = unit.names[position]
        self.shape = unit.shapes[position]
        self.dtype = unit.dtypes[position]
        """Of the live weight."""
        self.trainable = unit.trainable[position]
        self.opaque = unit.opaque[position]
        self.holds = 0
        self.stamp = (0, 0)
        self.writers = 0
        old = keeper_of(unit.params[position])
        self.ident = new_id() if old is None else old.ident
        # In elements of the parameter. Shards start at multiples of 4 KiB and parameters at multiples of 128 bytes, so
        # that no element of any dtype lies in two shards.
        start, end = house.core().shard(unit.index)
        word = unit.flat.itemsize
        self.offset = house.core().param_offset(unit.index, position) * word // self.dtype.itemsize
        self.shard = (end - start) * word // self.dtype.itemsize
        manage(unit.params[position], self)
        conceal(unit.params[position], unit.empties[position])

    @property
    def persists(self) -> bool:
        """See `Keeper`."""
        return self.house.visible

    @property
    def param(self) -> nn.Parameter:
        """The parameter itself."""
        return self.unit.params[self.position]

    def available(self) -> bool:
        """Whether the parameter shows its values now."""
        return self.holds > 0 or self.unit.state is UnitState.GATHERED

    # Who has what ---------------------------------------------------------------------------------------------------

    def pieces(self) -> list[tuple[int, int, int]]:
        """(rank, first element, elements) of the shards that hold the parameter."""
        numel = self.shape.numel()
        if self.house.alone:
            return [(self.house.ranks.rank, 0, numel)]
        found = []
        for rank in range(self.offset // self.shard, self.house.ranks.world):
            first = max(self.offset, rank * self.shard)
            end = min(self.offset + numel, (rank + 1) * self.shard)
            if first >= end:
                break
            found.append((rank, first - self.offset, end - first))
        return found

    def own(self) -> tuple[int, int]:
        """(first element, elements) of this rank's piece; elements are 0 where it has none."""
        for rank, start, count in self.pieces():
            if rank == self.house.ranks.rank:
                return start, count
        return 0, 0

    # Values ---------------------------------------------------------------------------------------------------------

    def read_own(self, part: str) -> torch.Tensor:
        """This rank's piece; nothing is exchanged. Raises ModelError for a frozen weight that fp32 cannot hold."""
        start, count = self.own()
        self._check_fp32()
        return self._fetch(part, start, torch.empty(count, dtype=torch.float32))

    def read(self, part: str) -> torch.Tensor:
        """All elements, on every rank. Every rank calls it. Raises as `read_own`."""
        self._check_fp32()
        return self._together(part, torch.float32)

    def read_live(self) -> torch.Tensor:
        """All elements of the live weight, flat, on every rank: every bit of a frozen one. Every rank calls it."""
        return self.live(self.read("weights")) if self.trainable else self._together("weights", self.dtype)

    def _together(self, part: str, dtype: torch.dtype) -> torch.Tensor:
        full = torch.empty(self.shape.numel(), dtype=dtype)
        for rank, start, count in self.pieces():
            piece = full[start : start + count]
            if rank == self.house.ranks.rank:
                self._fetch(part, start, piece)
            if not self.house.alone:
                self.house.broadcast(piece, rank, self.name)
        return full

    def _fetch(self, part: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """Elements that this rank keeps into `out`: fp32, or of a frozen weight the dtype that it has."""
        core, place = self.house.core(), (self.unit.index, self.position)
        if not out.numel():
            return out
        if self.trainable or part != "weights":
            core.read_param(*place, part, start, spec(out))
        else:
            found = out if out.dtype == self.dtype else torch.empty(out.numel(), dtype=self.dtype)
            core.read_bytes(*place, start * self.dtype.itemsize, spec(bytes_of(found)))
            if found is not out:
                out.copy_(found)
        return out

    def _check_fp32(self) -> None:
        if not self.trainable and not exact_in_fp32(self.dtype):
            raise ModelError(
                f"{self.name} has dtype {self.dtype}, whose values fp32 cannot hold: take and set them inside "
                "zeroxide.zero.GatheredParameters",
                name=self.name,
            )

    def write(self, part: str, full: torch.Tensor) -> None:
        """Makes `full`, which is the same on every rank, the parameter's. Every rank calls it.

        A frozen weight takes values of its own dtype as they are, and rounds fp32 to bf16 and fp16.
        """
        # Other ranks may still use the weights, which may be one copy for all.
        self.house.barrier(self.name)
        if part == "grad":
            start, count = self.own()
            self._write(part, start, full[start : start + count])
        else:
            self._write(part, 0, full)
        self.house.barrier(self.name)

    def write_own(self, part: str, values: torch.Tensor) -> None:
        """Replaces this rank's piece. Every rank calls it."""
        self.house.barrier(self.name)
        self._write(part, self.own()[0], values)
        self.house.barrier(self.name)

    def _write(self, part: str, start: int, values: torch.Tensor) -> None:
        self.house.before_change()
        core, place = self.house.core(), (self.unit.index, self.position)
        if self.trainable or part != "weights":
            core.write_param(*place, part, start, spec(values))
        elif values.numel():
            raw = bytes_of(converted(values, self.dtype))
            core.write_bytes(*place, start * self.dtype.itemsize, spec(raw))

    def has_gradient(self, everywhere: bool) -> bool:
        """Whether a gradient has come since the last step: on any rank, which all call, or on this one."""
        if not self.trainable:
            return False
        before = sum(unit.num_trainable for unit in self.house.units[: self.unit.index])
        landed = self.house.core().landed()[before + sum(self.unit.trainable[: self.position])]
        if everywhere and self.house.ranks.world > 1:
            with self.house.watch.waiting("whether there is a gradient", self.name):
                landed = int(self.house.ranks.gather_rows(torch.tensor([landed], dtype=torch.uint8)).amax())
        return bool(landed)

    def live(self, exact: torch.Tensor) -> torch.Tensor:
        """The live weight that fp32 values of a trainable parameter have, flat, in the compute dtype."""
        return converted(exact, self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a parameter has nobody who keeps its values.
        return type(None), ()

    # As a keeper ----------------------------------------------------------------------------------------------------

    def local(self) -> torch.Tensor:
        """This rank's piece of the live weight; nothing is exchanged."""
        return self.live(self.read_own("weights")) if self.trainable else self._own_live()

    def _own_live(self) -> torch.Tensor:
        start, count = self.own()
        return self._fetch("weights", start, torch.empty(count, dtype=self.dtype))

    def open(self, param: nn.Parameter, copy: torch.Tensor | None = None) -> None:
        """See `Keeper`. The copy is beside the unit's own memory, which other ranks may share.

        copy: one that is there already, in the parameter's shape.
        """
        if not self.holds:
            self.unit.lend(self.position, self.read_live().view(self.shape) if copy is None else copy)
        self.holds += 1

    def close(self, param: nn.Parameter, source: int | None) -> None:
        """See `Keeper`. Elements that were not changed keep all bits of their master weight, and moments stay."""
        self.holds -= 1
        problem = None
        try:
            if source is not None:
                problem = self._take_changes(param, source)
        finally:
            if not self.holds:
                self.unit.take_back(self.position)
        if problem is not None:
            raise ModelError(
                f"{self.name} is {problem} on rank {source} after GatheredParameters: expected {self.dtype} "
                f"{tuple(self.shape)}; write into the parameter instead of replacing it",
                name=self.name,
            )

    def hand_out(self, param: nn.Parameter) -> None:
        """See `Keeper`."""
        house = self.house
        if (self.holds or house.watches_data) and self not in house.handed_out and self.available():
            house.handed_out[self] = fingerprint(param)

    def changed_by_hand(self, param: nn.Parameter) -> bool:
        """See `Keeper`."""
        before = self.house.handed_out.pop(self, None)
        return before is not None and before != fingerprint(param)

    def give_up(self, param: nn.Parameter) -> None:
        """See `Keeper`."""
        if not self.holds:
            self.unit.take_back(self.position)

    def _take_changes(self, param: nn.Parameter, source: int) -> str | None:
        """Makes what rank `source` shows the parameter's values; returns what is wrong with that, if anything."""
        fits = (param.shape, param.dtype, param.device.type) == (self.shape, self.dtype, "cpu")
        fits = fits and why_not_bytes(param) is None
        problem = self._agreed(None if fits else f"{param.dtype} {tuple(param.shape)} on {param.device}", source)
        if problem is not None:
            return problem
        flat = bytes_of(param).view(self.dtype)
        if self.house.ranks.rank != source:
            flat = torch.empty(self.shape.numel(), dtype=self.dtype)
        if self.house.ranks.world > 1:
            self.house.broadcast(flat, source, self.name)
        self._replace(flat)
        if self.holds:
            self.unit.lend(self.position, copy_of(flat).view(self.shape))
        return None

    def _agreed(self, problem: str | None, source: int) -> str | None:
        if self.house.ranks.world == 1:
            return problem
        with self.house.watch.waiting("whether a changed parameter fits", self.name):
            found: str | None = self.house.ranks.gather_objects(problem)[source]
        return found

    def _replace(self, live: torch.Tensor) -> None:
        if not self.trainable:
            self.write("weights", live)
            return
        full = live.to(torch.float32)
        start, count = self.own()
        if count:
            exact = self.read_own("weights")
            piece = full[start : start + count]
            piece.copy_(torch.where(self.live(exact) == live[start : start + count], exact, piece))
        self.write("weights", full)


def seat_all(house: House) -> None:
    """Gives every parameter of the engine its seat."""
    for unit in house.units:
        for position in range(len(unit.params)):
            Seat(house, unit, position)


def seat_of(param: torch.Tensor) -> Seat | None:
    """The seat of an engine's parameter."""
    keeper = keeper_of(param)
    return keeper if isinstance(keeper, Seat) else None
