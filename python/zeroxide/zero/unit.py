"""One unit: parameters that appear and disappear together over one flat buffer whose address never changes."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from zeroxide import _core
from zeroxide.device.placement import HOST, addresses, is_host, view_of
from zeroxide.distributed import UnitGroups
from zeroxide.errors import ModelError
from zeroxide.params.empty import conceal, conceal_all, reveal, reveal_all
from zeroxide.params.handle import unmanage
from zeroxide.plan.plan import UnitPlan
from zeroxide.precision.bits import bytes_of, copy_of
from zeroxide.zero.passes import GradientState, UnitState
from zeroxide.zero.unit_memory import make_memory

__all__ = ["Unit"]

# Asked of every parameter in every pass.
_VERSION: Callable[[torch.Tensor], int] = attrgetter("_version")


class Unit:
    """Parameters gathered and released together. Their order is that of the plan and of the core."""

    def __init__(
        self,
        index: int,
        plan: UnitPlan,
        core: _core.Offload,
        dtype: torch.dtype,
        groups: UnitGroups,
        device: torch.device = HOST,
    ) -> None:
        self.index = index
        self.groups = groups
        self.name = plan.name
        self.modules = plan.modules
        self.held_through_backward = plan.held_through_backward
        self.names = [entry.name for entry in plan.params]
        self.params: list[nn.Parameter] = [entry.param for entry in plan.params]
        self.owners: list[list[nn.Module]] = [[owner for _, owner in entry.owners] for entry in plan.params]
        self.shapes = [entry.shape for entry in plan.params]
        self.trainable = [entry.trainable for entry in plan.params]
        self.opaque = [entry.opaque for entry in plan.params]
        self.experts = plan.experts
        """Whether its parameters are those of experts that only some of the ranks have."""
        self.routed = plan.routed
        """Whether it is one expert's, which is used only where a token goes to it."""
        self.states = plan.state.initial
        """The state tensors that the optimizer keeps of each trainable parameter, with what they start from."""
        self.has_frozen = not all(self.trainable)
        self.num_trainable = sum(self.trainable)
        self.flat = view_of(core.window(index), dtype)
        """1D, in the core's memory, valid only while the core holds the unit."""
        self.layout_numel = self.flat.numel()
        self.dtypes = [entry.dtype for entry in plan.params]
        self.device = device
        """Where the parameters show their values."""
        self.memory = make_memory(index, plan, core, dtype, self.flat, device)
        self.views = self.memory.views
        self.empties = [torch.empty(0, dtype=kind, device=device) for kind in self.dtypes]
        self.state = UnitState.RELEASED
        self.gradients = GradientState.IDLE
        self.lent: dict[int, torch.Tensor] = {}
        """Positions whose parameters show a copy of their values, whatever becomes of the unit."""
        self.versions = [0] * len(self.params)

    def take_over(self, large: dict[int, type[nn.Parameter]]) -> None:
        """The parameters have their handles and are empty.

        large: classes that parameters at some positions have while they show values.
        """
        for position, param in enumerate(self.params):
            reveal(param, self.views[position])
            if position in large:
                param.__class__ = large[position]
            conceal(param, self.empties[position])

    def accumulator(self, position: int) -> Any:
        """The node that takes the gradient of an empty trainable parameter, made with the parameter's own shape.

        Autograd makes it when a parameter is first used, with the shape that it has then, and checks gradients against
        that. It lives as long as somebody has it, and the parameter with it.
        """
        param = self.params[position]
        reveal(param, self.views[position])
        with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
            made = param.view_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        conceal(param, self.empties[position])
        return made

    def show(self) -> None:
        """Lets the parameters be views of the flat weights. The core holds the memory under them."""
        if self.state is UnitState.GATHERED:
            return
        reveal_all(self.params, self.views)
        self.note_versions()
        self.state = UnitState.GATHERED
        self._show_lent()
        self._note_shown()

    def hide(self) -> None:
        """Makes the parameters empty again."""
        if self.state is UnitState.RELEASED:
            return
        conceal_all(self.params, self.empties)
        self.state = UnitState.RELEASED
        self._show_lent()
        self._note_shown()

    def outline(self) -> None:
        """Gives the parameters, which stay without values, their shapes: gradients are measured by them. An operation
        on one brings the values."""
        conceal_all(self.params, self.views)
        self.state = UnitState.OUTLINED
        self._show_lent()
        self._note_shown()

    def hand_over(self) -> None:
        """Gives every parameter memory of its own with the values it shows, and forgets that it was a unit's.

        On a device the unit's memory is that: it goes with the last of its parameters.
        """
        for param in self.params:
            if is_host(self.device):
                param.data = copy_of(param.data)
            unmanage(param)
        self.state = UnitState.RELEASED
        self.gradients = GradientState.IDLE
        self.lent.clear()

    def lend(self, position: int, copy: torch.Tensor) -> None:
        """Lets a parameter show `copy`, in its shape and dtype, until it is taken back."""
        self.lent[position] = copy
        reveal(self.params[position], copy)
        self._note_shown()

    def take_back(self, position: int) -> None:
        """Ends `lend`."""
        self.lent.pop(position, None)
        if self.state is UnitState.GATHERED:
            reveal(self.params[position], self.views[position])
        else:
            shown = self.empties if self.state is UnitState.RELEASED else self.views
            conceal(self.params[position], shown[position])
        self._note_shown()
        self.versions[position] = self.params[position]._version

    # What others do to the parameters ---------------------------------------------------------------------------------

    def note_versions(self) -> None:
        """Takes the parameters as they are for unchanged."""
        self.versions = [*map(_VERSION, self.params)]

    def edits(self) -> list[int]:
        """Positions of parameters that were changed in place since they were shown, other than while lent."""
        if [*map(_VERSION, self.params)] == self.versions:
            return []
        found = [
            position
            for position, (param, version) in enumerate(zip(self.params, self.versions, strict=True))
            if param._version != version
        ]
        return [position for position in found if position not in self.lent]

    def edited(self) -> str | None:
        """The name of a parameter changed in place since `note_versions`, other than while lent; None if none was."""
        found = self.edits()
        return self.names[found[0]] if found else None

    def replaced(self) -> list[int]:
        """Positions of shown parameters whose `.data` somebody has replaced, other than by `lend`."""
        shown, own_addresses = addresses(self.params), self.memory.addresses()
        if shown == own_addresses:
            return []
        pairs = enumerate(zip(shown, own_addresses, strict=True))
        found = [position for position, (now, own) in pairs if now != own]
        return [position for position in found if position not in self.lent]

    def undo_cast(self, position: int) -> bool:
        """Whether a parameter shows its values in a wider dtype, as in a module that casts itself in forward; if so, it
        shows its own again.
        """
        param, view = self.params[position], self.views[position]
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            shown = param.detach()
            same = shown.dtype is not view.dtype and shown.shape == view.shape and shown.device == view.device
            if not same or not torch.equal(shown.to(view.dtype), view):
                return False
        reveal(param, view)
        self.versions[position] = param._version
        return True

    def check_replaced(self, positions: list[int]) -> None:
        """Raises ModelError unless what was put in the parameters' place has their shape and dtype."""
        for position in positions:
            param, view = self.params[position], self.views[position]
            if param.shape != view.shape or param.dtype != view.dtype or param.device != view.device:
                raise ModelError(
                    f"{self.names[position]} is {_described(param)} now, {_described(view)} in the engine: its .data "
                    "was replaced, as module.to(), float() or half() do; undo that, or convert the model before "
                    "zeroxide.initialize",
                    name=self.names[position],
                )

    def take_in(self, position: int) -> None:
        """Makes what was put in a parameter's place its value, in the unit's own memory."""
        param, view = self.params[position], self.views[position]
        with torch.no_grad():
            bytes_of(view).copy_(bytes_of(param.data))
        param.data = view

    def has_readers(self) -> bool:
        """Whether somebody beside this unit has views of its weights while it is released, and is served."""
        return self.memory.has_readers()

    def contains(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is the unit's. Tensors of other kinds have no memory that could be."""
        if tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        return self.memory.contains(tensor)

    def _note_shown(self) -> None:
        self.memory.note_shown(None if self.state is UnitState.RELEASED else self.lent)

    def _show_lent(self) -> None:
        for position, copy in self.lent.items():
            reveal(self.params[position], copy)


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
