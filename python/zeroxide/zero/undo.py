"""What an engine's construction that fails leaves: what was there before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeroxide import _core
from zeroxide.device.placement import HOST, address, has_values, spec
from zeroxide.errors import ModelError
from zeroxide.params.handle import handle_of
from zeroxide.plan.plan import ParameterPlan, Plan
from zeroxide.precision.bits import bytes_of, converted
from zeroxide.zero.init.slices import Slice

__all__ = ["Undo"]

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Where torch keeps a parameter's hooks; None until there is one."""


class Undo:
    """What a model and the caller's optimizer are, and how they become so again.

    Modules get their attributes, hooks, parameters and buffers back; a parameter whose values have moved gets them from
    the core. Where the core has not all of them, as with several ranks, or rounded ones, as of frozen parameters that
    the config casts, modules refuse to run and to be saved, and say why.

    Attributes that hold other objects keep those; what happens inside of them is not undone.
    """

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self._modules = [_Module(each) for each in module.modules()]
        # Parameters in slices refuse to be looked at while they are empty.
        with torch._C.DisableTorchFunctionSubclass():
            self._params = [_Param(each) for each in module.parameters()]
        groups = optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else []
        self._groups = [(group, dict(group)) for group in groups]
        self._core: _core.Offload | None = None
        self._parts: dict[int, Sequence[nn.Parameter]] = {}
        self._places: dict[int, _ParamLocation] = {}

    def moves(self, core: _core.Offload, plan: Plan) -> None:
        """Says that the values of the parameters move into `core` from here on."""
        self._core = core
        self._places = {
            id(entry.param): _ParamLocation(core, index, position, entry, plan.world)
            for index, unit in enumerate(plan.units)
            for position, entry in enumerate(unit.params)
        }

    def cut(self, param: nn.Parameter, parts: Sequence[nn.Parameter]) -> None:
        """Says that rows of the parameter, in order, are `parts` from here on, and it has no values itself."""
        self._parts[id(param)] = parts

    def restore(self) -> None:
        """Makes them what they were, and closes the core."""
        try:
            for each in self._modules:
                each.restore()
            for group, before in self._groups:
                group.clear()
                group.update(before)
            with torch._C.DisableTorchFunctionSubclass():
                lost = [each for each in self._params if not self._restore(each)]
        finally:
            if self._core is not None:
                self._core.close()
        if lost:
            gone = {id(each.param) for each in lost}
            for module in self._modules:
                if any(id(param) in gone for param in module.module._parameters.values()):
                    module.refuse()

    def _restore(self, each: _Param) -> bool:
        """Whether the parameter has its values again."""
        parts = self._parts.get(id(each.param))
        if parts is None or not each.address:
            return each.restore(self._places.get(id(each.param)))
        return each.restore_from([(part, self._places.get(id(part))) for part in parts])


@dataclass(frozen=True, slots=True)
class _ParamLocation:
    """Where the core has one parameter."""

    core: _core.Offload
    unit: int
    position: int
    entry: ParameterPlan
    world: int


class _Module:
    """One module as it was."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        # Tables of hooks, parameters, buffers and modules: changed in place, and looked at through the same objects.
        self.tables = {name: dict(each) for name, each in self.attributes.items() if _is_table(name, each)}
        self.kind = type(module)

    def restore(self) -> None:
        module = self.module
        module.__class__ = self.kind
        module.__dict__.clear()
        module.__dict__.update(self.attributes)
        for name, entries in self.tables.items():
            table = self.attributes[name]
            table.clear()
            table.update(entries)

    def refuse(self) -> None:
        self.module.register_forward_pre_hook(_refuse)
        self.module.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
        self.module.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]


class _Param:
    """One parameter as it was, without its values."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param = param
        self.kind = type(param)
        self.attributes = dict(param.__dict__)
        self.shape, self.dtype = param.shape, param.dtype
        # One on the meta device never gets values from here.
        self.device = param.device
        self.grad = param.grad
        tables = {name: getattr(param, name) for name in _HOOKS}
        self.hooks = {name: (table, dict(table or ())) for name, table in tables.items()}
        self.address = _address(param)
        self.handle = handle_of(param)

    def restore_from(self, parts: Sequence[tuple[nn.Parameter, _ParamLocation | None]]) -> bool:
        """The same of one that was cut: rows that have not moved are still where all of it was."""
        rows = [part.data if part.numel() else _moved(part, place, self.dtype) for part, place in parts]
        found = [each for each in rows if each is not None]
        first = found[0] if found else None
        if first is not None and len(found) == len(parts):
            kept = all(part.numel() for part, _ in parts) and address(first) == self.address
            self.param.data = first.as_strided(self.shape, first.stride()) if kept else torch.cat(found).to(self.device)
            self.address = _address(self.param)
        return self.restore(None)

    def restore(self, place: _ParamLocation | None) -> bool:
        """Whether it has its values again."""
        param = self.param
        param.__class__ = self.kind
        for name in param.__dict__.keys() - self.attributes.keys():
            del param.__dict__[name]
        param.__dict__.update(self.attributes)
        for name, (table, entries) in self.hooks.items():
            if table is not None:
                table.clear()
                table.update(entries)
            setattr(param, name, table)
        if isinstance(self.handle, Slice):
            return self._restore_slice(self.handle, place)
        if _address(param) == self.address and param.shape == self.shape:
            whole = True
        else:
            values = _read(place, self.shape, self.dtype)
            whole = values is not None
            values = torch.empty(0, dtype=self.dtype, device=HOST) if values is None else values
            param.data = values.to(self.device)
        param.grad = self.grad if whole else None
        return whole

    def _restore_slice(self, handle: Slice, place: _ParamLocation | None) -> bool:
        if handle.values.numel() == handle.each:
            if handle.full:
                handle.empty(self.param)
            return True
        values = _read(place, handle.shape, handle.dtype)
        if values is None:
            return False
        handle.values = values.view(-1)
        handle.empty(self.param)
        return True


def _read(place: _ParamLocation | None, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
    """The values of one parameter, None where this rank's core has not all of them, or not all of their bits."""
    if place is None or place.world > 1:
        return None
    try:
        if place.entry.trainable:
            values = torch.empty(shape, dtype=torch.float32, device=HOST)
            place.core.read_param(place.unit, place.position, "weights", 0, spec(values.view(-1)))
            return converted(values, dtype)
        if place.entry.dtype != dtype:
            return None
        values = torch.empty(shape, dtype=dtype, device=HOST)
        place.core.read_bytes(place.unit, place.position, 0, spec(bytes_of(values)))
    except Exception:  # whatever stopped the construction may have stopped the disk, too
        return None
    return values


def _moved(part: nn.Parameter, place: _ParamLocation | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if place is None else _read(place, place.entry.shape, dtype)


def _address(param: torch.Tensor) -> int:
    plain = has_values(param) and param.layout is torch.strided and type(param.data) is torch.Tensor
    return address(param) if plain else 0


def _is_table(name: str, value: Any) -> bool:
    return isinstance(value, dict) and (
        isinstance(value, OrderedDict) or name in ("_parameters", "_buffers", "_modules") or name.endswith("_hooks")
    )


def _refuse(module: nn.Module, *_: Any) -> None:
    raise ModelError(
        f"{type(module).__name__} lost weights when its engine could not be made, after they had moved into it: build "
        "the model again"
    )
