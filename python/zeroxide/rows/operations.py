"""What is computed of a matrix a block of its rows at a time: rows looked up, a projection, and its cross entropy.

Looking up is exact. Logits of a block are those of the whole projection where the matrix product computes each output
by itself, which is the library's to say. The gradient of a projection's input is a sum over blocks, in fp32 where the
input has fewer bits, each rounded to the input's dtype before; that of the matrix is each block's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from zeroxide.device.placement import autocast_dtype, has_values, is_host
from zeroxide.losses.linear_cross_entropy import (
    COLUMNS,
    check_arguments,
    chunk_logits,
    chunks,
    reduced,
    sums_again,
    sums_for,
)
from zeroxide.rows.block import RowBlocks

__all__ = ["cross_entropy", "look_up", "project"]


def look_up(
    blocks: RowBlocks, ids: torch.Tensor, padding_idx: int | None, scale_grad_by_freq: bool, sparse: bool
) -> torch.Tensor:
    """`functional.embedding` of the matrix: ids of any shape -> (*ids.shape, features).

    Blocks without ids are not used in host memory, unless all must be. Raises IndexError for an id that is no row.
    """
    flat, rows = ids.reshape(-1), blocks.shape[0]
    if flat.numel() and has_values(flat) and (int(flat.min()) < 0 or int(flat.max()) >= rows):
        raise IndexError(f"index out of range in self: {blocks.name} has {rows} rows")
    padding = None if padding_idx is None else padding_idx % rows
    ends = torch.tensor([block.rows.end for block in blocks], device=flat.device)
    place = torch.bucketize(flat, ends, right=True)
    order = place.argsort(stable=True)
    counts = place.bincount(minlength=len(blocks)).tolist()
    parts, start, every = [], 0, blocks.every or not is_host(flat.device)
    for number, (block, count) in enumerate(zip(blocks, counts, strict=True)):
        if count or every or (number == 0 and not flat.numel()):
            first, end = block.rows.first, block.rows.end
            own = padding - first if padding is not None and first <= padding < end else None
            mine = flat[order[start : start + count]] - first
            parts.append(block(_rows, mine, own, scale_grad_by_freq, sparse))
        start += count
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found[order.argsort()].view(*ids.shape, blocks.shape[1])


def _rows(
    weight: torch.Tensor, ids: torch.Tensor, padding: int | None, scale_grad_by_freq: bool, sparse: bool
) -> torch.Tensor:
    return functional.embedding(ids, weight, padding_idx=padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def project(blocks: RowBlocks, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear` with the matrix: (..., features) -> (..., rows)."""
    lower = autocast_dtype(x.device)
    if lower is not None:
        # Once: autocast would for each block, and keep each.
        x = x.to(lower)
    wide = _Widened.apply(x) if _sums_wide(x) else None
    parts = []
    for block in blocks:
        own = None if bias is None else bias[block.rows.first : block.rows.end]
        given = x if wide is None else _Narrowed.apply(wide, x.detach())
        parts.append(block(_product, given, own))
    return torch.cat(parts, -1)


def _product(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x, weight, bias)


def _sums_wide(x: torch.Tensor) -> bool:
    """Whether the parts of the gradient of `x` are summed in fp32; not where functions are transformed."""
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and x.dtype.itemsize < 4
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Widened(torch.autograd.Function):
    """Stands for x where gradients are summed in fp32. It has no values, and takes no memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.dtype = x.dtype
        return x.new_zeros((), dtype=torch.float32).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.to(ctx.dtype)


class _Narrowed(torch.autograd.Function):
    """x for one block, whose gradient goes to what stands for x in fp32."""

    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.float(), None


def cross_entropy(
    blocks: RowBlocks,
    input: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    columns: int = COLUMNS,
    in_parts: None = None,
) -> torch.Tensor:
    """`losses.linear_cross_entropy` with the matrix: `columns` of a block have their logits at a time.

    Raises what that does.
    """
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1).to(input.device)
    check_arguments(rows, blocks.shape, targets, linear_bias, reduction, columns)
    dtype = autocast_dtype(rows.device) or rows.dtype
    rows, bias = rows.to(dtype), None if linear_bias is None else linear_bias.to(dtype)
    state = _Passing(rows, targets)
    wide = _Widened.apply(rows) if rows.requires_grad and torch.is_grad_enabled() else None
    done = []
    for block in blocks:
        own = None if bias is None else bias[block.rows.first : block.rows.end]
        done.append(block(_add_block, wide, rows.detach(), own, state, block.rows.first, columns))
    losses: torch.Tensor = _Losses.apply(state, targets, ignore_index, *done)
    return reduced(losses, target, targets, reduction, ignore_index)


class _Passing:
    """What one call's blocks hand on: forward the sums so far, backward those of all blocks and what a row counts."""

    def __init__(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        self.sums: Any = sums_for(rows, targets)
        self.launcher = self.sums.launcher
        self.scale: torch.Tensor | None = None


def _add_block(weight: torch.Tensor, *args: Any) -> torch.Tensor:
    if has_torch_function((weight,)):
        # Whoever watches the uses of a weight is told of this one.
        seen: torch.Tensor = handle_torch_function(_add_block, (weight,), weight, *args)
        return seen
    found: torch.Tensor = _Block.apply(weight, *args)
    return found


class _Block(torch.autograd.Function):
    """Adds the logits of one block to the sums. What it gives says in backward, when the sums are complete, that the
    block's turn has come."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        wide: torch.Tensor | None,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        state: _Passing,
        first: int,
        columns: int,
    ) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            for start, end in chunks(weight.shape[0], columns):
                state.sums.add(chunk_logits(rows, weight, bias, start, end), first + start)
        ctx.save_for_backward(weight, rows, bias)
        ctx.state, ctx.first, ctx.columns = state, first, columns
        return rows.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        weight, rows, bias = ctx.saved_tensors
        wants_weight, wants_rows, _, wants_bias = ctx.needs_input_grad[:4]
        state, first = ctx.state, ctx.first
        with torch._C.DisableTorchFunctionSubclass():
            rows_gradient = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device) if wants_rows else None
            weight_gradient = torch.empty_like(weight) if wants_weight else None
            bias_gradient = torch.empty_like(bias) if bias is not None and wants_bias else None
            for start, end in chunks(weight.shape[0], ctx.columns):
                part = state.sums.gradients(chunk_logits(rows, weight, bias, start, end), first + start, state.scale)
                if rows_gradient is not None:
                    rows_gradient += part.mm(weight[start:end].to(rows.dtype))
                if bias_gradient is not None:
                    bias_gradient[start:end] = part.sum(0)
                if weight_gradient is not None:
                    weight_gradient[start:end] = part.t().mm(rows)
        return weight_gradient, rows_gradient, None, bias_gradient, None, None, None


class _Losses(torch.autograd.Function):
    """One loss a row, of the sums of all blocks."""

    @staticmethod
    def forward(ctx: Any, state: _Passing, targets: torch.Tensor, ignore: int, *done: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(targets, *state.sums.kept())
        ctx.state, ctx.ignore, ctx.blocks = state, ignore, len(done)
        found: torch.Tensor = state.sums.losses(ignore)
        state.sums = None
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        targets, *kept = ctx.saved_tensors
        ctx.state.scale = torch.where(targets == ctx.ignore, 0.0, gradient)
        ctx.state.sums = sums_again(ctx.state.launcher, targets, kept)
        turn = gradient.new_zeros(())
        return None, None, None, *(turn for _ in range(ctx.blocks))
