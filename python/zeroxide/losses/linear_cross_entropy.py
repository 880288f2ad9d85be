"""Cross entropy of a projection onto a large vocabulary, without its logits.

With 128,000 words, 4,096 tokens have 2 GiB of logits in fp32, and as much again for their gradient. Of the logits only
one number a token is needed: log of the sum of their exponentials. Here the vocabulary is gone through in chunks.
Forward keeps of each token the largest logit so far, the sum of the exponentials relative to it, and the target's
logit; backward computes the logits of each chunk again, and from them the gradient of those rows of the weight, whole,
and what they add to the gradient of the input.

The logits of a chunk are those of the whole projection, rounded to its dtype; exponentials and sums are fp32. The
gradient of the weight is rounded as the whole projection's is. That of the input is a sum over chunks in fp32, each
rounded to the dtype of the projection before.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from zeroxide.device.placement import autocast_dtype
from zeroxide.errors import TensorError

__all__ = ["COLUMNS", "WeightInParts", "linear_cross_entropy", "token_losses"]

COLUMNS = 4096
"""Columns of a chunk where nobody says another number."""


class WeightInParts(Protocol):
    """What accumulates a weight's gradient beside autograd, a block of rows at a time."""

    def is_lean(self, accumulate: Any) -> bool:
        """Whether it does in this backward; `accumulate` is the node that would fill `.grad`."""

    def accumulate_part(self, start: int, part: torch.Tensor) -> None:
        """Takes a block of rows, whose first element is number `start` of the weight."""


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    columns: int = COLUMNS,
    in_parts: WeightInParts | None = None,
) -> torch.Tensor:
    """-log softmax(input W^T + b)[target], fp32: what `torch.nn.functional.cross_entropy` gives of fp32 logits.

    input: (..., features), fp32, bf16 or fp16; linear_weight: (vocabulary, features); target: (...), int64,
    `ignore_index` where no loss counts; linear_bias: (vocabulary,). `reduction` is "mean" over the targets that count,
    "sum", or "none" for one loss a target. `columns` of the vocabulary have their logits at a time. `in_parts` is for
    parameters whose gradient is accumulated beside autograd.

    Raises TensorError where shapes or dtypes do not go together.
    """
    if has_torch_function((linear_weight,)):
        found: torch.Tensor = handle_torch_function(
            linear_cross_entropy,
            (linear_weight,),
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            reduction=reduction,
            ignore_index=ignore_index,
            columns=columns,
            in_parts=in_parts,
        )
        return found
    rows = input.reshape(-1, input.shape[-1])
    targets = target.reshape(-1).to(rows.device)
    _check(rows, linear_weight, targets, linear_bias, reduction, columns)
    losses = token_losses(rows, linear_weight, targets, linear_bias, ignore_index, columns, in_parts)
    if reduction == "none":
        return losses.view(target.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def _check(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    reduction: str,
    columns: int,
) -> None:
    call = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none") or columns < 1:
        raise ValueError(
            f'{call}: expected reduction "mean", "sum" or "none" and columns from 1 on, got {reduction!r}, {columns}'
        )
    wanted = {
        "linear_weight": (tuple(weight.shape), (weight.shape[0], rows.shape[1])),
        "target": (tuple(targets.shape), (rows.shape[0],)),
        "linear_bias": (None if bias is None else tuple(bias.shape), None if bias is None else (weight.shape[0],)),
    }
    for name, (got, expected) in wanted.items():
        if got != expected:
            raise TensorError(
                f"{call}: {name} has shape {got}: expected {expected}", name=name, expected=str(expected), got=str(got)
            )
    if targets.dtype is not torch.int64:
        raise TensorError(
            f"{call}: target is {targets.dtype}: expected torch.int64",
            name="target",
            expected="torch.int64",
            got=str(targets.dtype),
        )


def token_losses(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ignore: int,
    columns: int,
    in_parts: WeightInParts | None,
) -> torch.Tensor:
    """The loss of each of `rows`, (rows, features), fp32; 0 where the target is `ignore`."""
    dtype = autocast_dtype() or rows.dtype
    # Autograd casts their gradients back.
    rows, bias = rows.to(dtype), None if bias is None else bias.to(dtype)
    found: torch.Tensor = _TokenLosses.apply(rows, weight, bias, targets, ignore, columns, in_parts)
    return found


class _TokenLosses(torch.autograd.Function):
    """One loss a row. `rows` and `bias` are in the dtype of all products; the weight is cast a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        ignore: int,
        columns: int,
        in_parts: WeightInParts | None,
    ) -> torch.Tensor:
        largest = torch.full((rows.shape[0],), -torch.inf, device=rows.device)
        total, picked = torch.zeros_like(largest), torch.zeros_like(largest)
        with torch._C.DisableTorchFunctionSubclass():
            for start, end in _chunks(weight.shape[0], columns):
                wide = _logits(rows, weight, bias, start, end).float()
                larger = torch.maximum(largest, wide.amax(1))
                here = (targets >= start) & (targets < end)
                column = (targets - start).clamp(0, end - start - 1).unsqueeze(1)
                picked = torch.where(here, wide.gather(1, column).squeeze(1), picked)
                total = total * (largest - larger).exp() + wide.sub_(larger.unsqueeze(1)).exp_().sum(1)
                largest = larger
        log_sum = largest + total.log()
        ctx.save_for_backward(rows, weight, bias, targets, log_sum)
        ctx.ignore, ctx.columns, ctx.in_parts = ignore, columns, in_parts
        return torch.where(targets == ignore, 0.0, log_sum - picked)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, weight, bias, targets, log_sum = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        scale = torch.where(targets == ctx.ignore, 0.0, gradient).unsqueeze(1)
        lean = wants_weight and ctx.in_parts is not None and ctx.in_parts.is_lean(ctx.next_functions[1][0])
        with torch._C.DisableTorchFunctionSubclass():
            rows_gradient = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device) if wants_rows else None
            weight_gradient = torch.empty_like(weight) if wants_weight and not lean else None
            bias_gradient = torch.empty_like(bias) if bias is not None and wants_bias else None
            # The last part may end the use of the weight, whose shape is gone then.
            features, chunks = weight.shape[1], list(_chunks(weight.shape[0], ctx.columns))
            for start, end in chunks:
                wide = _logits(rows, weight, bias, start, end).float()
                wide.sub_(log_sum.unsqueeze(1)).exp_()
                here = ((targets >= start) & (targets < end)).float().unsqueeze(1)
                column = (targets - start).clamp(0, end - start - 1).unsqueeze(1)
                wide.scatter_add_(1, column, -here).mul_(scale)
                part = wide.to(rows.dtype)
                if rows_gradient is not None:
                    rows_gradient += part.mm(weight[start:end].to(rows.dtype))
                if bias_gradient is not None:
                    bias_gradient[start:end] = part.sum(0)
                if lean:
                    ctx.in_parts.accumulate_part(start * features, part.t().mm(rows))
                elif weight_gradient is not None:
                    weight_gradient[start:end] = part.t().mm(rows)
        found = None if rows_gradient is None else rows_gradient.to(rows.dtype)
        return found, weight_gradient, bias_gradient, None, None, None, None


def _logits(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, start: int, end: int) -> torch.Tensor:
    part = None if bias is None else bias[start:end]
    return torch.nn.functional.linear(rows, weight[start:end].to(rows.dtype), part)


def _chunks(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, end) of chunks of nearly one size: a product of a single row is another function's, with sums in another
    order."""
    parts = -(-rows // most)
    return pairwise(rows * number // parts for number in range(parts + 1))
