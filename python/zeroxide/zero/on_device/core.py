"""The core of an engine some of whose units are at home on the device that computes.

It has the face of the core: everybody else asks it as they ask the core, for values by (unit, parameter, name), for the
norm, for a step. What is about bytes of a unit on the device is answered from there, all else by the core itself, which
keeps the books of every parameter and refuses by name what it is asked about bytes that it has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from zeroxide import _core
from zeroxide.zero.on_device.state import StateOnDevice
from zeroxide.zero.on_device.unit import UnitOnDevice

__all__ = ["CoreOnDevice", "device_part", "host_part", "with_device"]


class CoreOnDevice:
    """See above. `state` is None until the units are there: no call about values comes before."""

    def __init__(self, host: _core.Offload, on_device: frozenset[int]) -> None:
        self.host = host
        self.on_device = on_device
        self.state: StateOnDevice | None = None
        self._filling: tuple[int, str] | None = None

    def __getattr__(self, name: str) -> Any:
        # Only what this class does not have: the core's own.
        return getattr(self.host, name)

    def _has(self, unit: int) -> bool:
        return unit in self.on_device

    def _there(self) -> StateOnDevice:
        assert self.state is not None, "units come before their values"
        self.state.follow()
        return self.state

    @contextmanager
    def _values_of(self, unit: int) -> Iterator[UnitOnDevice]:
        """Within it values of a unit there are read and written."""
        there = self._there()
        state = there.units[unit]
        with there.health.doing(f"values of {state.name} were asked for"):
            yield state

    # Values ---------------------------------------------------------------------------------------------------------

    def fill_begin(self, unit: int, part: str) -> None:
        """See `_core.Offload`."""
        if self._filling is not None:
            raise RuntimeError(f"fill_begin: unit {self._filling[0]} is being filled")
        if not self._has(unit):
            self.host.fill_begin(unit, part)
            return
        with self._values_of(unit) as state:
            state.clear(part)
        self._filling = unit, part

    def fill_param(self, unit: int, param: int, start: int, values: _core.TensorSpec) -> None:
        """See `_core.Offload`."""
        if not self._has(unit):
            self.host.fill_param(unit, param, start, values)
            return
        given = values.tensor.view(-1)
        with self._values_of(unit) as state:
            state.write(self._part_filled(unit), state.place(param, start, given.numel()), given)

    def fill_bytes(self, unit: int, param: int, start: int, bytes: _core.TensorSpec) -> None:
        """See `_core.Offload`."""
        if not self._has(unit):
            self.host.fill_bytes(unit, param, start, bytes)
            return
        self._part_filled(unit)
        self._write_bytes(unit, param, start, bytes)

    def fill_commit(self, unit: int) -> None:
        """See `_core.Offload`."""
        if not self._has(unit):
            self.host.fill_commit(unit)
            return
        part = self._part_filled(unit)
        self._filling = None
        if part == "weights":
            self._there().changed([unit])

    def _part_filled(self, unit: int) -> str:
        if self._filling is None or self._filling[0] != unit:
            raise RuntimeError(f"unit {unit} is not being filled")
        return self._filling[1]

    def read_param(self, unit: int, param: int, part: str, start: int, out: _core.TensorSpec) -> None:
        """See `_core.Offload`."""
        if not self._has(unit):
            self.host.read_param(unit, param, part, start, out)
            return
        target = out.tensor.view(-1)
        with self._values_of(unit) as state:
            if part == "grad" and not self._has_gradient(unit, param):
                target.zero_()
            elif not state.trainable[param]:
                size = state.compute.itemsize
                raw = state.frozen(param, start * size, target.numel() * size)
                target.copy_(raw.view(state.compute) if part == "weights" else torch.zeros_like(target))
            elif target.numel():
                target.copy_(state.read(part, state.place(param, start, target.numel())))

    def write_param(self, unit: int, param: int, part: str, start: int, values: _core.TensorSpec) -> None:
        """See `_core.Offload`."""
        if not self._has(unit):
            self.host.write_param(unit, param, part, start, values)
            return
        given = values.tensor.view(-1)
        with self._values_of(unit) as state:
            if part == "grad":
                self._there().write_gradient(unit, param, start, given)
            else:
                state.write(part, state.place(param, start, given.numel()), given)
        if part == "weights":
            self._there().changed([unit])

    def read_bytes(self, unit: int, param: int, start: int, out: _core.TensorSpec) -> None:
        """See `_core.Offload`."""
        if not self._has(unit):
            self.host.read_bytes(unit, param, start, out)
            return
        target = out.tensor.view(-1)
        with self._values_of(unit) as state:
            target.copy_(state.frozen(param, start, target.numel()))

    def write_bytes(self, unit: int, param: int, start: int, bytes: _core.TensorSpec) -> None:
        """See `_core.Offload`."""
        if not self._has(unit):
            self.host.write_bytes(unit, param, start, bytes)
            return
        self._write_bytes(unit, param, start, bytes)
        self._there().changed([unit])

    def _write_bytes(self, unit: int, param: int, start: int, bytes: _core.TensorSpec) -> None:
        given = bytes.tensor.view(-1)
        with self._values_of(unit) as state:
            state.frozen(param, start, given.numel()).copy_(given)

    # Gradients and steps --------------------------------------------------------------------------------------------

    def _has_gradient(self, unit: int, param: int) -> bool:
        return bool(self.host.has_gradient(unit, param))

    def grad_norm(self) -> tuple[float, bool, int]:
        """See `_core.Offload`."""
        if self.state is not None:
            self.state.measure()
        return self.host.grad_norm()

    def clear_gradients(self) -> None:
        """See `_core.Offload`."""
        if self.state is not None:
            self.state.forget_gradients()
        self.host.clear_gradients()

    def step(self, groups: list[_core.Rule], grad_scale: float) -> None:
        """See `_core.Offload`. What is on the device may be under way when this returns; what is read there waits."""
        self._there().step(groups, grad_scale)

    def close(self, readers: list[int] | None = None) -> None:
        """See `_core.Offload`."""
        if self.state is not None:
            self.state.close()
        self.host.close(readers)


def with_device(core: _core.Offload, on_device: frozenset[int]) -> _core.Offload:
    """The core, or where some units are at home on the device, what answers for both."""
    return cast("_core.Offload", CoreOnDevice(core, on_device)) if on_device else core


def host_part(core: _core.Offload) -> _core.Offload:
    """The core itself, for what takes it as an argument of the extension module."""
    found: object = core
    return found.host if isinstance(found, CoreOnDevice) else core


def device_part(core: _core.Offload) -> CoreOnDevice | None:
    """What answers for both; None where no unit is at home on the device."""
    found: object = core
    return found if isinstance(found, CoreOnDevice) else None
