"""Parameters of an engine, one by one: reading and changing values that lie in the ranks' shards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zeroxide.device.health import DeviceHealth
from zeroxide.device.placement import HOST, in_host, is_host, spec
from zeroxide.distributed import Ranks, Watch
from zeroxide.errors import ModelError
from zeroxide.params.empty import conceal
from zeroxide.params.handle import handle_of, manage, new_id
from zeroxide.precision.bits import bytes_of, converted, copy_of, exact_in_fp32, fingerprint, why_not_bytes
from zeroxide.zero.gather.device_weights import DeviceWeights
from zeroxide.zero.passes import UnitState, in_backward
from zeroxide.zero.unit import Unit
from zeroxide.zero.whole import Whole

if TYPE_CHECKING:
    from zeroxide.zero.gather.gatherer import Gatherer
    from zeroxide.zero.hooks import Hooks
    from zeroxide.zero.live_core import LiveCore

__all__ = ["ParameterContext", "ShardedParam", "shard_all", "sharded_param_of"]


class ParameterContext:
    """What the parameters of one engine have in common."""

    def __init__(
        self,
        core: LiveCore,
        gatherer: Gatherer,
        units: list[Unit],
        ranks: Ranks,
        watch: Watch,
        *,
        params_always_full: bool,
        on_disk: bool,
        health: DeviceHealth,
        keeps_edits: bool = False,
    ) -> None:
        self.whole: Whole = Whole()
        """What puts parameters together whose parts other ranks have."""
        self.health = health
        """Whether the device that parameters show their values on is there."""
        self.keeps_edits = keeps_edits
        """Whether a change in place of a weight that always shows its values counts."""
        self.on_disk = on_disk
        """Whether weights are at home on disk, which does not see what is written into memory."""
        self.core = core
        self.gatherer = gatherer
        self.units = units
        self.ranks = ranks
        self.watch = watch
        self.params_always_full = params_always_full
        self.hooks: Hooks | None = None
        """What gathers; None once the engine has ended."""
        self.handed_out: dict[ShardedParam, int] = {}
        """Parameters whose `.data` somebody has taken, with the fingerprint of what it showed then."""
        self.on_device = not all(is_host(unit.device) for unit in units)
        """Whether parameters show memory of a device, of which the core knows nothing."""
        self.watches_data = self.on_device or (not params_always_full and (on_disk or ranks.world > 1))
        """Whether what is written through `.data` would be lost, or be one rank's alone."""
        self.changes = 0
        """How often values of parameters have changed since the start."""
        self.waits: list[Callable[[], None]] = []
        """Called before values change: a save in the background waits here until it has what it needs."""

    def in_pass(self) -> bool:
        """Whether a forward or backward is under way, in which parameters are used where they are."""
        return self.hooks is not None and self.hooks.in_pass()

    def use(self, params: Sequence[torch.Tensor]) -> None:
        """Gathers the units of parameters that an operation needs. Every rank does. Raises ModelError after the end."""
        used = [sharded for param in params if (sharded := sharded_param_of(param)) is not None]
        if self.hooks is None:
            raise ModelError(
                f"{used[0].name} was used after its engine was destroyed: at stage 3 the weights are gone with it; "
                "take engine.module_state_dict() or save before",
                name=used[0].name,
            )
        if self.hooks.thread != threading.get_ident() and not in_backward():
            raise ModelError(
                f"{used[0].name} was used by another thread than the one that runs the model, for which weights come "
                "and go: use copies, as state_dict() gives them between steps",
                name=used[0].name,
            )
        self.hooks.use(list({sharded.unit.index: sharded.unit for sharded in used}.values()))

    def lacks(self, unit: Unit) -> bool:
        """Whether a pass is under way on this thread to which the unit has not been brought."""
        return self.hooks is not None and self.hooks.lacks(unit)

    def apart(self) -> AbstractContextManager[None]:
        """What an operation outside of a pass is done in, from `use` to `end_use`."""
        return nullcontext() if self.hooks is None else self.hooks.apart()

    def end_use(self, recorded: Sequence[torch.Tensor]) -> None:
        """Ends `use` outside of a pass; `recorded` are the results that autograd knows the way to."""
        if self.hooks is not None:
            self.hooks.end_use(recorded)

    def expect_gradient(self, param: torch.Tensor) -> None:
        """The parameter, empty, may be used in the pass by what gathers it later."""
        sharded = sharded_param_of(param)
        if sharded is not None and sharded.trainable and self.hooks is not None and torch.is_grad_enabled():
            self.hooks.uses.accumulators.append(sharded.unit.accumulator(sharded.position))

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
        with self.written(unit, edited):
            if self.on_disk:
                self.core().rewrite_weights(unit.index)

    def written(self, unit: Unit, positions: Sequence[int]) -> AbstractContextManager[None]:
        """Within it the core's window of the unit has what the parameters at `positions` show."""
        weights = self.gatherer.weights
        return weights.writing(unit, positions) if isinstance(weights, DeviceWeights) else nullcontext()

    def changed_by_hand(self, unit: Unit) -> list[int]:
        """Positions of parameters of the unit that were changed through their `.data` since that was taken."""
        if not self.handed_out:
            return []
        sharded_params = [sharded for sharded in self.handed_out if sharded.unit is unit and not sharded.holds]
        return [sharded.position for sharded in sharded_params if sharded.changed_by_hand(sharded.param)]

    def before_change(self) -> None:
        """Waits until values may change: no weights are on their way, and nobody reads what is there for himself."""
        self.take_down_edits()
        self.changes += 1
        self.forget_by_hand()
        self.gatherer.drain()
        for wait in self.waits:
            wait()

    def after_change(self, units: Sequence[Unit] | None = None) -> None:
        """Values of some units, or of all, have changed since `before_change` by another way than a step: parameters
        that show theirs show the new ones."""
        if isinstance(self.gatherer.weights, DeviceWeights):
            self.gatherer.weights.refresh(units)

    def take_down_edits(self, units: Sequence[Unit] | None = None) -> None:
        """Makes what was written into weights on a device the core's, before anybody asks the core for them."""
        if not (self.on_device and self.keeps_edits):
            return
        for unit in self.units if units is None else units:
            edited = sorted({*unit.edits(), *self.changed_by_hand(unit)})
            if edited:
                with self.written(unit, edited):
                    unit.note_versions()

    def forget_by_hand(self) -> None:
        """Values change by the engine's own hand."""
        for sharded in [each for each in self.handed_out if not each.holds]:
            del self.handed_out[sharded]

    def barrier(self, name: str) -> None:
        """Until every rank is here."""
        with self.watch.waiting("a barrier", name):
            self.ranks.barrier()

    def broadcast(self, values: torch.Tensor, source: int, name: str) -> None:
        """Overwrites `values`, contiguous, with that rank's."""
        with self.watch.waiting("a broadcast", name):
            self.ranks.broadcast_tensor(values, source)


class ShardedParam:
    """Keeps one parameter of an engine. `part` is "weights", "grad" or one of `states`; values are fp32.

    A frozen parameter is bytes to the core: its values are taken and given in its own dtype, as `live` ones.
    """

    in_engine = True

    def __init__(self, context: ParameterContext, unit: Unit, position: int) -> None:
        self.context = context
        self.unit = unit
        self.position = position
        self.name = unit.names[position]
        self.shape = unit.shapes[position]
        self.dtype = unit.dtypes[position]
        """Of the live weight."""
        self.trainable = unit.trainable[position]
        self.states = unit.states if self.trainable else {}
        """The state tensors that the optimizer keeps of it, with what they start from."""
        self.opaque = unit.opaque[position]
        self.holds = 0
        self.stamp = (0, 0)
        self.writers = 0
        old = handle_of(unit.params[position])
        self.ident = new_id() if old is None else old.ident
        # In elements of the parameter. Shards start at multiples of 4 KiB and parameters at multiples of 128 bytes, so
        # that no element of any dtype lies in two shards.
        start, end = context.core().shard(unit.index)
        word = unit.flat.itemsize
        self.offset = context.core().param_offset(unit.index, position) * word // self.dtype.itemsize
        self.shard = (end - start) * word // self.dtype.itemsize
        manage(unit.params[position], self)
        conceal(unit.params[position], unit.empties[position])

    @property
    def persists(self) -> bool:
        """See `ParamHandle`."""
        return self.context.params_always_full

    @property
    def param(self) -> nn.Parameter:
        """The parameter itself."""
        return self.unit.params[self.position]

    def available(self) -> bool:
        """Whether the parameter shows its values now."""
        return self.holds > 0 or self.unit.state is UnitState.GATHERED

    def users(self) -> set[nn.Module]:
        """See `ParamHandle`."""
        in_use = self.unit.state is UnitState.GATHERED and not self.persists
        return set(self.unit.modules) if in_use else set()

    def touch(self, param: nn.Parameter) -> None:
        """A module looks at the parameter: in a pass, it is about to use it."""
        if self.context.lacks(self.unit):
            self.context.use([param])

    # Who has what ---------------------------------------------------------------------------------------------------

    def pieces(self) -> list[tuple[int, int, int]]:
        """(position in the shard group, first element, elements) of the shards that hold the parameter."""
        numel = self.shape.numel()
        shard = self.unit.groups.shard
        if shard.size == 1:
            return [(0, 0, numel)]
        found = []
        for position in range(self.offset // self.shard, shard.size):
            first = max(self.offset, position * self.shard)
            end = min(self.offset + numel, (position + 1) * self.shard)
            if first >= end:
                break
            found.append((position, first - self.offset, end - first))
        return found

    def own(self) -> tuple[int, int]:
        """(first element, elements) of the piece in this rank's shard; elements are 0 where it has none."""
        for position, start, count in self.pieces():
            if position == self.unit.groups.shard.position:
                return start, count
        return 0, 0

    # Values ---------------------------------------------------------------------------------------------------------

    def read_own(self, part: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """This rank's piece, or `count` elements of it from `start`; nothing is exchanged. Raises ModelError for a
        frozen weight that fp32 cannot hold."""
        first, most = self.own()
        self._check_fp32()
        found = torch.empty(most - start if count is None else count, dtype=torch.float32, device=HOST)
        return self._fetch(part, first + start, found)

    def read(self, part: str) -> torch.Tensor:
        """All elements, on every rank. Every rank calls it. Raises as `read_own`."""
        self._check_fp32()
        return self._together(part, torch.float32)

    def read_live(self) -> torch.Tensor:
        """All elements of the live weight, flat, on every rank: every bit of a frozen one. Every rank calls it."""
        return self.live(self.read("weights")) if self.trainable else self._together("weights", self.dtype)

    def _together(self, part: str, dtype: torch.dtype) -> torch.Tensor:
        full = torch.empty(self.shape.numel(), dtype=dtype, device=HOST)
        groups = self.unit.groups
        # Experts have other names on other ranks.
        name = self.unit.name if self.unit.experts else self.name
        for position, start, count in self.pieces():
            piece = full[start : start + count]
            if position == groups.shard.position:
                self._fetch(part, start, piece)
            if groups.shard.size == 1:
                continue
            # Of experts, each place in its turn: their units have the same layout, and all ranks are in one group.
            for everyone in groups.places or (groups.everyone,):
                mine = everyone == groups.everyone
                # Every replica has the same: the first one's is sent.
                self.context.broadcast(piece if mine else torch.empty_like(piece), everyone[position], name)
        return full

    def _fetch(self, part: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """Elements that this rank keeps into `out`: fp32, or of a frozen weight the dtype that it has."""
        core, place = self.context.core(), (self.unit.index, self.position)
        if not out.numel():
            return out
        self.context.take_down_edits([self.unit])
        if self.trainable or part != "weights":
            core.read_param(*place, part, start, spec(out))
        else:
            found = out if out.dtype == self.dtype else torch.empty(out.numel(), dtype=self.dtype, device=HOST)
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
        self.context.barrier(self.name)
        if part == "grad":
            start, count = self.own()
            self._write(part, start, full[start : start + count])
        else:
            self._write(part, 0, full)
        self.context.barrier(self.name)

    def write_own(self, part: str, values: torch.Tensor, start: int = 0) -> None:
        """Replaces this rank's piece, or a part of it from `start`. Every rank calls it."""
        self.context.barrier(self.name)
        self._write(part, self.own()[0] + start, values)
        self.context.barrier(self.name)

    def _write(self, part: str, start: int, values: torch.Tensor) -> None:
        self.context.before_change()
        core, place = self.context.core(), (self.unit.index, self.position)
        if self.trainable or part != "weights":
            core.write_param(*place, part, start, spec(values))
        elif values.numel():
            raw = bytes_of(converted(values, self.dtype))
            core.write_bytes(*place, start * self.dtype.itemsize, spec(raw))
        self.context.after_change([self.unit])

    def has_gradient(self, everywhere: bool) -> bool:
        """Whether a gradient has come since the last step: on any rank, which all call, or on this one."""
        if not self.trainable:
            return False
        before = sum(unit.num_trainable for unit in self.context.units[: self.unit.index])
        accumulated = self.context.core().accumulated()[before + sum(self.unit.trainable[: self.position])]
        if everywhere and self.context.ranks.world > 1:
            with self.context.watch.waiting("whether there is a gradient", self.name):
                rows = self.context.ranks.gather_rows(torch.tensor([accumulated], dtype=torch.uint8, device=HOST))
                accumulated = int(rows[list(self.unit.groups.everyone)].amax())
        return bool(accumulated)

    def live(self, exact: torch.Tensor) -> torch.Tensor:
        """The live weight that fp32 values of a trainable parameter have, flat, in the compute dtype."""
        return converted(exact, self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a parameter has nobody who keeps its values.
        return type(None), ()

    # As a handle ----------------------------------------------------------------------------------------------------

    def local(self) -> torch.Tensor:
        """This rank's piece of the live weight; nothing is exchanged."""
        return self.live(self.read_own("weights")) if self.trainable else self._own_live()

    def _own_live(self) -> torch.Tensor:
        start, count = self.own()
        return self._fetch("weights", start, torch.empty(count, dtype=self.dtype, device=HOST))

    def open(self, param: nn.Parameter, copy: torch.Tensor | None = None) -> None:
        """See `ParamHandle`. The copy is beside the unit's own memory, which other ranks may share.

        copy: one that is there already, in the parameter's shape.
        """
        if not self.holds:
            shown = self.read_live().view(self.shape) if copy is None else copy
            with self.context.health.doing(f"values of {self.name} were asked for"):
                self.unit.lend(self.position, shown.to(self.unit.device))
        self.holds += 1

    def close(self, param: nn.Parameter, source: int | None) -> None:
        """See `ParamHandle`. Elements that were not changed keep all bits of their master weight, and moments stay."""
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
        """See `ParamHandle`."""
        context = self.context
        if (self.holds or context.watches_data) and self not in context.handed_out and self.available():
            context.handed_out[self] = fingerprint(param)

    def changed_by_hand(self, param: nn.Parameter) -> bool:
        """See `ParamHandle`."""
        before = self.context.handed_out.pop(self, None)
        return before is not None and before != fingerprint(param)

    def give_up(self, param: nn.Parameter) -> None:
        """See `ParamHandle`."""
        if not self.holds:
            self.unit.take_back(self.position)

    def _take_changes(self, param: nn.Parameter, source: int) -> str | None:
        """Makes what rank `source` shows the parameter's values; returns what is wrong with that, if anything."""
        fits = (param.shape, param.dtype) == (self.shape, self.dtype) and param.device == self.unit.device
        fits = fits and why_not_bytes(param) is None
        problem = self._agreed(None if fits else f"{param.dtype} {tuple(param.shape)} on {param.device}", source)
        if problem is not None:
            return problem
        with self.context.health.doing(f"values of {self.name} were changed"):
            flat = in_host(bytes_of(param)).view(self.dtype)
        if self.context.ranks.rank != source:
            flat = torch.empty(self.shape.numel(), dtype=self.dtype, device=HOST)
        if self.context.ranks.world > 1:
            self.context.broadcast(flat, source, self.name)
        self.context.whole.repeat(param, flat)
        self._replace(flat)
        if self.holds:
            self.unit.lend(self.position, copy_of(flat).view(self.shape).to(self.unit.device))
        return None

    def _agreed(self, problem: str | None, source: int) -> str | None:
        if self.context.ranks.world == 1:
            return problem
        with self.context.watch.waiting("whether a changed parameter fits", self.name):
            found: str | None = self.context.ranks.gather_objects(problem)[source]
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


def shard_all(context: ParameterContext) -> None:
    """Gives every parameter of the engine its handle."""
    for unit in context.units:
        for position in range(len(unit.params)):
            ShardedParam(context, unit, position)


def sharded_param_of(param: torch.Tensor) -> ShardedParam | None:
    """The sharded of an engine's parameter."""
    handle = handle_of(param)
    return handle if isinstance(handle, ShardedParam) else None
