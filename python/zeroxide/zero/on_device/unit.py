"""One unit's weights, optimizer state and gradients in memory of the device that computes, and values in and out of
it."""

from __future__ import annotations

import torch

from zeroxide import _core
from zeroxide.device.placement import DTYPE_NAMES, HOST, in_host, spec
from zeroxide.device.transfers import room_for_state
from zeroxide.errors import CoreError
from zeroxide.kernels.step import BLOCK, StateTensor, stored_as
from zeroxide.plan.plan import Plan
from zeroxide.precision.bits import bytes_of
from zeroxide.zero.unit import Unit
from zeroxide.zero.unit_memory import DeviceMemory

__all__ = ["UnitOnDevice"]

WEIGHTS = "weights"
GRADIENT = "grad"


class UnitOnDevice:
    """The tensors of one unit, in the core's layout: trained parameters first, each at a multiple of 64 elements.

    Raises DeviceError where the device has no room for them.
    """

    def __init__(self, unit: Unit, plan: Plan, core: _core.Offload) -> None:
        planned = plan.units[unit.index]
        count, _ = plan.numbers.padded[unit.index]
        memory, device = unit.memory, unit.device
        assert isinstance(memory, DeviceMemory), "made for a device"
        self.name = unit.name
        self.memory = memory
        self.compute, self.format = plan.compute, planned.state.format
        self.rule = planned.state.optimizer
        self.kept = {name: stored_as(name, dtype, nbytes) for name, dtype, nbytes, _ in planned.state.tensors}
        """How each state tensor is stored, by name."""
        self.numels = [entry.numel for entry in planned.params]
        self.offsets = [core.param_offset(unit.index, at) for at in range(len(planned.params))]
        """Of each parameter, in elements of the compute dtype."""
        self.trainable = unit.trainable
        with room_for_state(unit.name, device, plan.numbers.device_buckets or {}):
            memory.storage.resize_(memory.nbytes)
            memory.flat.zero_()
            self.tensors = {
                name: torch.full((self.kept[name].numel(count),), initial, dtype=self.kept[name].dtype, device=device)
                for name, _, _, initial in planned.state.tensors
            }
            """The state tensors beside the live weight, by name, in the core's order."""
            self.grad = torch.zeros(count, dtype=plan.grad, device=device)
        # Reserved as bytes: frozen parameters follow in their own dtypes.
        self.live = memory.own_view(count * plan.compute.itemsize).view(plan.compute)
        own = set(unit.states)
        self.exact = next((tensor for name, tensor in self.tensors.items() if name not in own), None)
        """What makes live weights exact; None where they are."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes on the device, by bucket."""
        return {
            "weights": self.memory.storage.nbytes(),
            "gradients": self.grad.nbytes,
            "optimizer": sum(tensor.nbytes for tensor in self.tensors.values()),
        }

    def place(self, position: int, start: int = 0, count: int = -1) -> slice:
        """Where elements `start ..` (all, if `count` is -1) of a trained parameter lie. Raises IndexError beyond it."""
        first = self.offsets[position] + start
        numel = self.numels[position]
        end = start + (numel - start if count < 0 else count)
        if not self.trainable[position]:
            raise IndexError(f"parameter {position} of unit {self.name} is frozen: it has bytes alone")
        if not 0 <= start <= end <= numel:
            raise IndexError(f"elements {start}..{end} of {numel} of parameter {position} of unit {self.name}")
        return slice(first, first + end - start)

    def parts(self, where: slice) -> list[torch.Tensor]:
        """Those elements of the live weight and of each state tensor, as an update takes them."""
        return [self.live[where], *(tensor[self.kept[name].place(where)] for name, tensor in self.tensors.items())]

    def frozen(self, position: int, start: int, nbytes: int) -> torch.Tensor:
        """Bytes `start ..` of a frozen parameter."""
        first = self.offsets[position] * self.compute.itemsize + start
        return self.memory.flat[first : first + nbytes]

    def clear(self, part: str) -> None:
        """Makes all values of "weights", frozen ones among them, or of a state tensor zero."""
        if part != WEIGHTS:
            self._tensor(part).zero_()
            return
        self.memory.flat.zero_()
        if self.exact is not None:
            self.exact.zero_()

    def read(self, part: str, where: slice) -> torch.Tensor:
        """Elements of "weights", "grad" or a state tensor, as fp32 in host memory."""
        if part != WEIGHTS:
            tensor, kept = self._tensor(part), self.kept.get(part)
            if kept is None or kept.per_block == BLOCK:
                return in_host(tensor[where]).to(torch.float32)
            return self._decoded(tensor, kept, where)
        live = in_host(self.live[where])
        exact = None if self.exact is None else spec(bytes_of(in_host(self.exact[where])))
        out = torch.empty(live.numel(), dtype=torch.float32, device=HOST)
        _core.decode_weights(self.format, DTYPE_NAMES[self.compute], spec(out), spec(bytes_of(live)), exact)
        return out

    def write(self, part: str, where: slice, values: torch.Tensor) -> None:
        """Replaces elements by fp32 values in host memory. A weight becomes exactly that, its live one the rounding."""
        if part != WEIGHTS:
            target, kept = self._tensor(part), self.kept.get(part)
            if kept is None or kept.per_block == BLOCK:
                target[where].copy_(values.to(target.dtype))
            else:
                self._encode(target, kept, where, values)
            return
        live = torch.empty(values.numel(), dtype=self.compute, device=HOST)
        exact = None if self.exact is None else torch.empty(values.numel(), dtype=self.exact.dtype, device=HOST)
        beside = None if exact is None else spec(bytes_of(exact))
        names = self.format, DTYPE_NAMES[self.compute]
        _core.encode_weights(*names, spec(values), spec(bytes_of(live)), beside)
        self.live[where].copy_(live)
        if exact is not None and self.exact is not None:
            self.exact[where].copy_(exact)

    def _decoded(self, tensor: torch.Tensor, kept: StateTensor, where: slice) -> torch.Tensor:
        """Elements of a tensor in blocks, of which those that are cut are read as a whole."""
        blocks = slice(where.start // BLOCK * BLOCK, where.stop)
        out = torch.empty(blocks.stop - blocks.start, dtype=torch.float32, device=HOST)
        stored = spec(bytes_of(in_host(tensor[kept.place(blocks)]).clone()))
        _core.decode_moment(self.rule, self.format, DTYPE_NAMES[self.compute], kept.name, stored, spec(out))
        return out[where.start - blocks.start :]

    def _encode(self, target: torch.Tensor, kept: StateTensor, where: slice, values: torch.Tensor) -> None:
        """Replaces whole blocks. Raises CoreError where one would be cut, as the core does."""
        if where.start == where.stop:
            return
        before = (at for at, first in enumerate(self.offsets) if first <= where.start)
        at = max((at for at in before if self.trainable[at] and self.numels[at]), key=self.offsets.__getitem__)
        first, numel = self.offsets[at], self.numels[at]
        start, end = where.start - first, where.stop - first
        if start % BLOCK or (end % BLOCK and end != numel):
            raise CoreError(
                f"write_param: elements {start}..{end} of {numel} of {kept.name}, which is kept in blocks of {BLOCK} "
                "elements: give whole blocks"
            )
        out = torch.empty(kept.numel(end - start), dtype=kept.dtype, device=HOST)
        stored = spec(bytes_of(out))
        _core.encode_moment(self.rule, self.format, DTYPE_NAMES[self.compute], kept.name, spec(values), stored)
        target[kept.place(where)].copy_(out)

    def _tensor(self, part: str) -> torch.Tensor:
        if part == GRADIENT:
            return self.grad
        if part not in self.tensors or self.tensors[part] is self.exact:
            raise KeyError(f"unit {self.name} has no state {part!r}: it has {', '.join(self.tensors)}")
        return self.tensors[part]
