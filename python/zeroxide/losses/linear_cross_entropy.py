"""Cross entropy of a projection onto a large vocabulary, without its logits.

With 128,000 words, 4,096 tokens have 2 GiB of logits in fp32, and as much again for their gradient. Of the logits only
one number a token is needed: log of the sum of their exponentials. Here the vocabulary is gone through in chunks.
Forward keeps of each token the largest logit so far, the sum of the exponentials relative to it, and the target's
logit; backward computes the logits of each chunk again, and from them the gradient of those rows of the weight, whole,
and what they add to the gradient of the input.

The logits of a chunk are those of the whole projection, rounded to its dtype; exponentials and sums are fp32. The
gradient of the weight is rounded as the whole projection's is. That of the input is a sum over chunks in fp32, each
rounded to the dtype of the projection before. On a device with kernels (`zeroxide.kernels.cross_entropy`) a chunk's
logits are read in the dtype that they have, and their gradients take their place: nothing of a chunk is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from zeroxide.device.placement import autocast_dtype, current
from zeroxide.errors import TensorError
from zeroxide.kernels import Launcher
from zeroxide.kernels.cross_entropy import RowSums, add_chunk, gradient_to, launcher_for

__all__ = [
    "COLUMNS",
    "WeightInParts",
    "check_arguments",
    "chunk_logits",
    "chunks",
    "linear_cross_entropy",
    "reduced",
    "sums_again",
    "sums_for",
    "token_losses",
]

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
    check_arguments(rows, linear_weight.shape, targets, linear_bias, reduction, columns)
    losses = token_losses(rows, linear_weight, targets, linear_bias, ignore_index, columns, in_parts)
    return reduced(losses, target, targets, reduction, ignore_index)


def reduced(
    losses: torch.Tensor, target: torch.Tensor, targets: torch.Tensor, reduction: str, ignore_index: int
) -> torch.Tensor:
    """The losses of `targets`, which are `target` in one dimension, as `reduction` asks."""
    if reduction == "none":
        return losses.view(target.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def check_arguments(
    rows: torch.Tensor,
    shape: torch.Size,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    reduction: str,
    columns: int,
) -> None:
    """Raises what `linear_cross_entropy` does, whose weight has `shape`."""
    call = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none") or columns < 1:
        raise ValueError(
            f'{call}: expected reduction "mean", "sum" or "none" and columns from 1 on, got {reduction!r}, {columns}'
        )
    wanted = {
        "linear_weight": (tuple(shape), (shape[0], rows.shape[1])),
        "target": (tuple(targets.shape), (rows.shape[0],)),
        "linear_bias": (None if bias is None else tuple(bias.shape), None if bias is None else (shape[0],)),
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
    dtype = autocast_dtype(rows.device) or rows.dtype
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
        sums = sums_for(rows, targets)
        with torch._C.DisableTorchFunctionSubclass():
            for start, end in chunks(weight.shape[0], columns):
                sums.add(chunk_logits(rows, weight, bias, start, end), start)
        ctx.save_for_backward(rows, weight, bias, targets, *sums.kept())
        ctx.ignore, ctx.columns, ctx.in_parts = ignore, columns, in_parts
        ctx.launcher = sums.launcher
        return sums.losses(ignore)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, weight, bias, targets, *kept = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        scale = torch.where(targets == ctx.ignore, 0.0, gradient)
        sums = sums_again(ctx.launcher, targets, kept)
        lean = wants_weight and ctx.in_parts is not None and ctx.in_parts.is_lean(ctx.next_functions[1][0])
        with torch._C.DisableTorchFunctionSubclass():
            rows_gradient = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device) if wants_rows else None
            weight_gradient = torch.empty_like(weight) if wants_weight and not lean else None
            bias_gradient = torch.empty_like(bias) if bias is not None and wants_bias else None
            # The last part may end the use of the weight, whose shape is gone then.
            features, ranges = weight.shape[1], list(chunks(weight.shape[0], ctx.columns))
            for start, end in ranges:
                part = sums.gradients(chunk_logits(rows, weight, bias, start, end), start, scale)
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


class _Sums:
    """What is known of each row after some chunks of its logits, by torch: the largest of them, the sum of exponentials
    relative to it, and the target's."""

    launcher: Launcher | None = None

    def __init__(self, targets: torch.Tensor, log_sum: torch.Tensor | None = None) -> None:
        """log_sum: that of all chunks, where gradients alone are asked for."""
        self.targets = targets
        self.largest = torch.full(targets.shape, -torch.inf, device=targets.device)
        self.total, self.picked = torch.zeros_like(self.largest), torch.zeros_like(self.largest)
        self.log_sum = log_sum

    def add(self, logits: torch.Tensor, start: int) -> None:
        """Takes the logits of the columns from `start` on."""
        wide = logits.float()
        larger = torch.maximum(self.largest, wide.amax(1))
        here, column = self._targets_in(start, logits.shape[1])
        self.picked = torch.where(here, wide.gather(1, column).squeeze(1), self.picked)
        before = self.total * (self.largest - larger).exp()
        self.total = before + wide.sub_(larger.unsqueeze(1)).exp_().sum(1)
        self.largest = larger

    def kept(self) -> tuple[torch.Tensor, ...]:
        """What gradients need, after all chunks."""
        self.log_sum = self.largest + self.total.log()
        return (self.log_sum,)

    def losses(self, ignore: int) -> torch.Tensor:
        """The loss of each row, fp32, after `kept`."""
        assert self.log_sum is not None
        return torch.where(self.targets == ignore, 0.0, self.log_sum - self.picked)

    def gradients(self, logits: torch.Tensor, start: int, scale: torch.Tensor) -> torch.Tensor:
        """Those of a chunk of logits, which may lose their values, in their dtype; `scale` is what a row counts."""
        assert self.log_sum is not None
        wide = logits.float().sub_(self.log_sum.unsqueeze(1)).exp_()
        here, column = self._targets_in(start, logits.shape[1])
        wide.scatter_add_(1, column, -here.float().unsqueeze(1)).mul_(scale.unsqueeze(1))
        return wide.to(logits.dtype)

    def _targets_in(self, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        here = (self.targets >= start) & (self.targets < start + width)
        return here, (self.targets - start).clamp(0, width - 1).unsqueeze(1)


class _LaunchedSums:
    """`_Sums` by kernels."""

    def __init__(
        self,
        launcher: Launcher,
        targets: torch.Tensor,
        largest: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
    ) -> None:
        self.launcher = launcher
        self.targets = targets
        if largest is None or total is None:
            self.sums = RowSums.empty(targets.shape[0], targets.device)
        else:
            # The target's logit has no part in gradients.
            self.sums = RowSums(largest, total, largest)

    def add(self, logits: torch.Tensor, start: int) -> None:
        with current(logits.device):
            add_chunk(self.launcher, self.sums, logits, start, self.targets)

    def kept(self) -> tuple[torch.Tensor, ...]:
        return self.sums.largest, self.sums.sum

    def losses(self, ignore: int) -> torch.Tensor:
        return self.sums.losses(self.targets, ignore)

    def gradients(self, logits: torch.Tensor, start: int, scale: torch.Tensor) -> torch.Tensor:
        with current(logits.device):
            gradient_to(self.launcher, logits, logits, start, self.targets, self.sums, scale)
        return logits


def sums_for(rows: torch.Tensor, targets: torch.Tensor) -> _Sums | _LaunchedSums:
    """By kernels where logits of the dtype of `rows` have some on its device."""
    launcher = launcher_for(rows)
    return _Sums(targets) if launcher is None else _LaunchedSums(launcher, targets)


def sums_again(launcher: Launcher | None, targets: torch.Tensor, kept: Sequence[torch.Tensor]) -> _Sums | _LaunchedSums:
    """For gradients, of what was `kept` of all chunks."""
    return _Sums(targets, *kept) if launcher is None else _LaunchedSums(launcher, targets, *kept)


def chunk_logits(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, start: int, end: int
) -> torch.Tensor:
    """Those of the columns `start .. end`."""
    part = None if bias is None else bias[start:end]
    return torch.nn.functional.linear(rows, weight[start:end].to(rows.dtype), part)


def chunks(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, end) of chunks of nearly one size: a product of a single row is another function's, with sums in another
    order."""
    parts = -(-rows // most)
    return pairwise(rows * number // parts for number in range(parts + 1))
