"""Gradients of large embeddings and projections, kept small.

A vocabulary of 50,000 gives embedding and output projection a gradient of tens of MiB each, dense, at once, and for the
embedding mostly zero. Two module types get a leaner path with the same bits:

- nn.Linear of `LARGE` elements or more: its weight gradient is computed a block of rows at a time, and each block lands
  at once. A row is a sum over samples in the same order, however many rows are computed together.
- nn.Embedding: its gradient comes as the rows that were looked up. Rows looked up more than once are summed in the
  order of the samples, in the dtype of the gradient, as the dense gradient is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from zeroxide import _core
from zeroxide.errors import ModelError
from zeroxide.zero.hook_handle import Hook
from zeroxide.zero.tensors import spec
from zeroxide.zero.unit import Unit

__all__ = ["LARGE", "LargeModules"]

LARGE = 8 << 20
"""Elements of a weight from which its gradient is landed in parts."""
PART = 2 << 20
"""Elements of a part, about."""

Land = Callable[[int, torch.Tensor], None]


class _Linear(torch.autograd.Function):
    """x W^T + b whose weight gradient goes to `land` in parts and not to autograd.

    `dtype` is that of x, bias and all products. It may be lower than the weight's, which is cast each time it is used:
    no copy of it lives from forward to backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, land: Land, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.land = land
        ctx.dtype = dtype
        ctx.has_bias = bias is not None
        return functional.linear(x, weight.to(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        x_flat = x.reshape(-1, x.shape[-1])
        # First: when the weight's own gradient is complete, its unit may be released.
        x_grad = flat.mm(weight.to(ctx.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            rows = max(1, PART // weight.shape[1])
            for start in range(0, weight.shape[0], rows):
                part = flat[:, start : start + rows].t().mm(x_flat)
                ctx.land(start * weight.shape[1], part)
        bias_grad = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return x_grad, None, bias_grad, None, None


class LargeModules:
    """Puts the leaner paths on the modules of a model, and takes them off again."""

    def __init__(
        self,
        core: _core.Offload,
        units: list[Unit],
        complete: Callable[[Unit, int], None],
        note_run: Callable[[Unit, nn.Module], None],
        closed: set[int],
        share: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.core = core
        self.share = share
        self.complete = complete
        self.note_run = note_run
        self.closed = closed
        self.patched: list[nn.Linear] = []
        self.sparse: list[nn.Embedding] = []
        for unit in units:
            for position, owners in enumerate(unit.owners):
                if unit.trainable[position] and unit.shapes[position].numel() >= LARGE:
                    for owner in owners:
                        self._adopt(unit, position, owner)

    def _adopt(self, unit: Unit, position: int, owner: nn.Module) -> None:
        weight = unit.params[position]
        if type(owner) is nn.Linear and owner.weight is weight and "forward" not in owner.__dict__:
            land = partial(self._land_part, unit, position)
            owner.forward = Hook(self._linear, unit, owner, land)  # type: ignore[method-assign]
            self.patched.append(owner)
        elif (
            type(owner) is nn.Embedding and owner.weight is weight and not owner.sparse and not owner.scale_grad_by_freq
        ):
            owner.sparse = True
            self.sparse.append(owner)

    def _linear(self, unit: Unit, owner: nn.Linear, land: Land, x: torch.Tensor) -> torch.Tensor:
        # In backward it is recomputation, which adds no gradient of its own.
        # Where the unit is this module's alone, its own hook has noted it.
        if torch._C._current_graph_task_id() == -1 and owner not in unit.modules:
            self.note_run(unit, owner)
        if not torch.is_grad_enabled() or not owner.weight.requires_grad:
            return functional.linear(x, owner.weight, owner.bias)
        bias: torch.Tensor | None = owner.bias
        dtype = owner.weight.dtype
        if torch.is_autocast_enabled("cpu"):
            # What autocast does to the arguments of a linear layer; autograd casts their gradients back.
            dtype = torch.get_autocast_dtype("cpu")
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        output: torch.Tensor = _Linear.apply(x, owner.weight, bias, land, dtype)
        return output

    def _land_part(self, unit: Unit, position: int, start: int, part: torch.Tensor) -> None:
        if unit.index in self.closed:
            raise_closed(unit)
        self.core.land(unit.index, position, start, spec(self.share(part)), True)
        if start + part.numel() == unit.shapes[position].numel():
            self.complete(unit, position)

    def close(self) -> None:
        """Gives every module its own path back."""
        for linear in self.patched:
            del linear.forward
        for embedding in self.sparse:
            embedding.sparse = False
        self.patched.clear()
        self.sparse.clear()


def land_rows(core: _core.Offload, unit: Unit, position: int, grad: torch.Tensor) -> None:
    """Lands a sparse gradient of shape (rows, width), not coalesced."""
    rows = grad._indices()[0].contiguous()
    core.land_rows(unit.index, position, grad.shape[0], spec(rows), spec(grad._values().contiguous()))


def raise_closed(unit: Unit) -> NoReturn:
    """Raises ModelError: a gradient has come after the unit's had gone out to the other ranks."""
    raise ModelError(
        f"a gradient of {unit.name} arrived after the unit had been reduced over the ranks: a module is used again in "
        "a way that forward did not show; make it part of a leaf module (zero.set_z3_leaf_modules)",
        name=unit.name,
    )
