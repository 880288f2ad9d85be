"""Cross entropy of logits that are there, without a second tensor of their size in fp32.

torch's own casts bf16 logits to fp32 for the logarithm, and keeps the log softmax for backward: twice four bytes a
logit. Here rows are gone through in blocks: forward keeps log of the sum of the exponentials of each row, backward
computes each block's softmax again.

On a device with kernels (`zeroxide.kernels.cross_entropy`) nothing of the logits is ever fp32: one launch reads them
and leaves two numbers a row, one reads them again and writes their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from zeroxide.device.placement import current
from zeroxide.errors import TensorError
from zeroxide.kernels import Launcher
from zeroxide.kernels.cross_entropy import RowSums, add_chunk, gradient_to, launcher_for

__all__ = ["chunked_cross_entropy"]

BLOCK_BYTES = 64 << 20
"""fp32 bytes of a block where nobody says how many rows it has."""


def chunked_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    block_rows: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """-log softmax(logits)[target], fp32: what `torch.nn.functional.cross_entropy` gives of fp32 logits.

    logits: (..., vocabulary), fp32, bf16 or fp16; target: (...), int64, `ignore_index` where no loss counts. reduction:
    "mean" over the targets that count, "sum", or "none" for one loss a target. block_rows: rows that are fp32 at a
    time, as many as 64 MiB hold if None; with kernels no row is. backend: "auto" takes kernels where the logits are on
    a device that has them, and "torch" never.

    Raises TensorError where shapes or dtypes do not go together, and ValueError for another reduction or backend.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'chunked_cross_entropy: expected reduction "mean", "sum" or "none", got {reduction!r}')
    if backend not in ("auto", "torch"):
        raise ValueError(f'chunked_cross_entropy: backend {backend!r} is not built: expected "auto" or "torch"')
    if logits.dim() < 1 or target.shape != logits.shape[:-1] or target.dtype is not torch.int64:
        raise TensorError(
            f"chunked_cross_entropy: target is {tuple(target.shape)} of {target.dtype}: expected "
            f"{tuple(logits.shape[:-1])} of torch.int64",
            name="target",
            expected=f"{tuple(logits.shape[:-1])} torch.int64",
            got=f"{tuple(target.shape)} {target.dtype}",
        )
    if not logits.is_floating_point():
        raise TensorError(
            f"chunked_cross_entropy: logits are {logits.dtype}: expected floating point",
            name="logits",
            expected="floating point",
            got=str(logits.dtype),
        )
    if block_rows is None:
        block_rows = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    elif block_rows < 1:
        raise ValueError(f"chunked_cross_entropy: block_rows: expected an integer of at least 1, got {block_rows!r}")
    rows, targets = logits.reshape(-1, logits.shape[-1]), target.reshape(-1).to(logits.device)
    counts = targets != ignore_index
    if bool(((targets < 0) | (targets >= rows.shape[1])).logical_and_(counts).any()):
        raise TensorError(
            f"chunked_cross_entropy: target has classes outside of 0 to {rows.shape[1] - 1}, other than {ignore_index}",
            name="target",
            expected=f"0 to {rows.shape[1] - 1}",
            got=f"{int(targets[counts].min())} to {int(targets[counts].max())}",
        )
    kernels = launcher_for(rows) if backend == "auto" else None
    losses: torch.Tensor
    if kernels is None:
        losses = _RowLosses.apply(rows, targets, ignore_index, block_rows)
    else:
        losses = _LaunchedRowLosses.apply(rows, targets, ignore_index, kernels)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


class _RowLosses(torch.autograd.Function):
    """One loss a row."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, targets: torch.Tensor, ignore: int, block: int) -> torch.Tensor:
        sums = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        for first in range(0, rows.shape[0], block):
            torch.logsumexp(rows[first : first + block].float(), 1, out=sums[first : first + block])
        picked = rows.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1).float()
        ctx.save_for_backward(rows, targets, sums)
        ctx.ignore, ctx.block = ignore, block
        return torch.where(targets == ignore, 0.0, sums - picked)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, targets, sums = ctx.saved_tensors
        scale = torch.where(targets == ctx.ignore, 0.0, gradient).unsqueeze(1)
        found = torch.empty_like(rows)
        for first in range(0, rows.shape[0], ctx.block):
            here = slice(first, first + ctx.block)
            wide = (rows[here].float() - sums[here].unsqueeze(1)).exp_()
            at = targets[here].clamp(min=0).unsqueeze(1)
            wide.scatter_add_(1, at, torch.full_like(at, -1, dtype=wide.dtype)).mul_(scale[here])
            found[here] = wide
        return found, None, None, None


class _LaunchedRowLosses(torch.autograd.Function):
    """`_RowLosses` by kernels, for all rows at once."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, targets: torch.Tensor, ignore: int, launcher: Launcher) -> torch.Tensor:
        rows, targets = rows.contiguous(), targets.contiguous()
        with current(rows.device):
            sums = RowSums.empty(rows.shape[0], rows.device)
            add_chunk(launcher, sums, rows, 0, targets)
        ctx.save_for_backward(rows, targets, sums.largest, sums.sum)
        ctx.ignore, ctx.launcher = ignore, launcher
        return sums.losses(targets, ignore)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, targets, largest, total = ctx.saved_tensors
        scale = torch.where(targets == ctx.ignore, 0.0, gradient).contiguous()
        found = torch.empty_like(rows)
        with current(rows.device):
            # The target's logit has no part in gradients.
            gradient_to(ctx.launcher, found, rows, 0, targets, RowSums(largest, total, largest), scale)
        return found, None, None, None
