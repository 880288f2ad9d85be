"""Cross entropy of logits of which each tensor-parallel rank has a part of the vocabulary.

`torch.distributed.tensor.parallel.loss_parallel` does the same for logits that are a DTensor, and only while backward
runs inside of it too; here backward is the engine's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional

from zeroxide.errors import ModelError
from zeroxide.parallel.tensor.group import TensorGroup

__all__ = ["causal_lm_loss", "vocab_parallel_cross_entropy"]


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    group: TensorGroup,
    first: int,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """As `torch.nn.functional.cross_entropy` of all logits; computed in fp32, the same on every rank.

    logits: [n, v], this rank's part of the vocabulary, tokens `first` to `first + v`. target: [n], tokens of all of it.
    reduction: "mean" over what is not ignored, "sum" or "none".

    Every rank of the group calls it. Raises ModelError for another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ModelError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    each: torch.Tensor = _CrossEntropy.apply(logits, target, group, first, ignore_index)
    if reduction == "none":
        return each
    return each.sum() / (target != ignore_index).sum() if reduction == "mean" else each.sum()


class _CrossEntropy(torch.autograd.Function):
    """[n] losses in fp32. With m the largest logit of a row, s the sum of exp(logit - m) and t the target's logit, a
    loss is log(s) + m - t, and its gradient exp(logit - m) / s, less 1 at the target."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, group: TensorGroup, first: int, ignore_index: int
    ) -> torch.Tensor:
        values = logits.float()
        largest = group.all_reduce(values.amax(-1), "the largest logit over tensor ranks", dist.ReduceOp.MAX)
        shifted = values - largest.unsqueeze(-1)
        here = (target >= first) & (target < first + logits.shape[-1])
        local = torch.where(here, target - first, 0)
        chosen = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0)
        exponentials = shifted.exp_()
        both = torch.stack([exponentials.sum(-1), chosen])
        total, at_target = group.all_reduce(both, "sums of a cross entropy over tensor ranks")
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), local, here, target != ignore_index)
        ctx.dtype = logits.dtype
        losses: torch.Tensor = (total.log() - at_target).masked_fill(target == ignore_index, 0)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        softmax, local, here, counts = ctx.saved_tensors
        rows = grad.masked_fill(~counts, 0).unsqueeze(-1)
        found = softmax * rows
        found.scatter_add_(-1, local.unsqueeze(-1), -rows.masked_fill(~here.unsqueeze(-1), 0))
        return found.to(ctx.dtype), None, None, None, None


def causal_lm_loss(
    group: TensorGroup,
    first: int,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """What Hugging Face's causal models call their `loss_function`, over this rank's part of the logits."""
    if shift_labels is None:
        assert labels is not None, "a loss is asked for with labels"
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = logits.reshape(-1, logits.shape[-1])
    target = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = vocab_parallel_cross_entropy(rows, target, group, first, ignore_index=ignore_index, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
