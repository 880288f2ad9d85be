"""One unit: parameters that appear and disappear together over one flat buffer whose address never changes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from zeroxide import _core
from zeroxide.errors import ModelError
from zeroxide.zero.bits import copy_of, tensor_of
from zeroxide.zero.empty import conceal, reveal
from zeroxide.zero.keeper import unmanage
from zeroxide.zero.plan import UnitPlan
from zeroxide.zero.state import UnitState
from zeroxide.zero.tensors import view_of

__all__ = ["Unit", "refuse_edits"]


class Unit:
    """Parameters gathered and released together. Their order is that of the plan and of the core."""

    def __init__(self, index: int, plan: UnitPlan, core: _core.Offload, dtype: torch.dtype) -> None:
        self.index = index
        self.name = plan.name
        self.modules = plan.modules
        self.span = plan.span
        self.names = [entry.name for entry in plan.params]
        self.params: list[nn.Parameter] = [entry.param for entry in plan.params]
        self.owners: list[list[nn.Module]] = [[owner for _, owner in entry.owners] for entry in plan.params]
        self.shapes = [entry.shape for entry in plan.params]
        self.trainable = [entry.trainable for entry in plan.params]
        self.opaque = [entry.opaque for entry in plan.params]
        self.has_frozen = not all(self.trainable)
        self.num_trainable = sum(self.trainable)
        window = core.window(index)
        flat = view_of(window, dtype)  # 1D, valid only while gathered
        self.flat = flat
        self.layout_numel = flat.numel()
        self.dtypes = [entry.dtype for entry in plan.params]
        self.views: list[torch.Tensor] = []
        for position, (shape, kind) in enumerate(zip(self.shapes, self.dtypes, strict=True)):
            start = core.param_offset(index, position) * dtype.itemsize
            nbytes = shape.numel() * kind.itemsize
            raw = view_of(window, torch.uint8, start, nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)
            self.views.append(tensor_of(raw, kind, shape))
        self.empties = [torch.empty(0, dtype=kind) for kind in self.dtypes]
        self.state = UnitState.RELEASED
        self.lent: dict[int, torch.Tensor] = {}
        """Positions whose parameters show a copy of their values, whatever becomes of the unit."""
        self.versions = [0] * len(self.params)

    def show(self) -> None:
        """Lets the parameters be views of the flat weights. The core holds the memory under them."""
        if self.state is UnitState.GATHERED:
            return
        for param, view in zip(self.params, self.views, strict=True):
            reveal(param, view)
        self.state = UnitState.GATHERED
        self._show_lent()

    def hide(self) -> None:
        """Makes the parameters empty again."""
        if self.state is UnitState.RELEASED:
            return
        for param, empty in zip(self.params, self.empties, strict=True):
            conceal(param, empty)
        self.state = UnitState.RELEASED
        self._show_lent()

    def hand_over(self) -> None:
        """Gives every parameter memory of its own with the values it shows, and forgets that it was a unit's."""
        for param in self.params:
            param.data = copy_of(param.data)
            unmanage(param)
        self.state = UnitState.RELEASED
        self.lent.clear()

    def lend(self, position: int, copy: torch.Tensor) -> None:
        """Lets a parameter show `copy`, in its shape and dtype, until it is taken back."""
        self.lent[position] = copy
        reveal(self.params[position], copy)

    def take_back(self, position: int) -> None:
        """Ends `lend`."""
        self.lent.pop(position, None)
        if self.state is UnitState.GATHERED:
            reveal(self.params[position], self.views[position])
        else:
            conceal(self.params[position], self.empties[position])
        self.versions[position] = self.params[position]._version

    def note_versions(self) -> None:
        """Takes the parameters as they are for unchanged."""
        self.versions = [param._version for param in self.params]

    def edited(self) -> str | None:
        """The name of a parameter changed in place since `note_versions`, other than while lent; None if none was."""
        for position, (param, version) in enumerate(zip(self.params, self.versions, strict=True)):
            if param._version != version and position not in self.lent:
                return self.names[position]
        return None

    def _show_lent(self) -> None:
        for position, copy in self.lent.items():
            reveal(self.params[position], copy)


def refuse_edits(units: Iterable[Unit]) -> None:
    """Raises ModelError when a parameter, of which all ranks of this host share one copy, was changed in place."""
    for unit in units:
        name = unit.edited()
        if name is not None:
            raise ModelError(
                f"{name} was changed in place, and it is one copy for all ranks of this host, which each of them "
                "would change again: change it inside zeroxide.zero.GatheredParameters(params, modifier_rank=0)",
                name=name,
            )
