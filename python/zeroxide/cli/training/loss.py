"""The language-model loss without the copies: next-token cross entropy straight from low-precision logits.

`transformers` turns the logits into fp32, takes a log-softmax of that, and autograd keeps one more of each for
backward: for a vocabulary of 50 257 that is about 800 KB a token, more than all layers of a small model together. Here
a few rows at a time are widened to fp32, and only the log-sum-exp of each row is kept; backward makes the gradient
row by row in the logits' own dtype and in their own memory, since nothing needs them any more: a graph can therefore
be differentiated once. The numbers are those of `torch.nn.functional.cross_entropy` over fp32 logits, up to the order
of summation inside a row.

Where even these logits are too many, `without_logits` has the output projection compute the loss itself, a chunk of the
vocabulary at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zeroxide.errors import ModelError
from zeroxide.losses import linear_cross_entropy

__all__ = ["LossHead", "causal_lm_loss", "without_logits"]

_PIECE_ELEMENTS = 1 << 20
_IGNORED = -100


class _CrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over rows whose target is not ignored.

    logits: (rows, vocabulary), any float dtype, overwritten by backward; targets: (rows,), int64; result: fp32 scalar.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_sum = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for rows in _pieces(logits):
            wide = logits[rows].float()
            log_sum[rows] = torch.logsumexp(wide, dim=-1)
            kept = targets[rows] != _IGNORED
            picked = wide.gather(1, targets[rows].clamp_min(0).unsqueeze(1)).squeeze(1)
            total += torch.where(kept, log_sum[rows] - picked, 0.0).sum()
        ctx.save_for_backward(logits, targets, log_sum)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        logits, targets, log_sum = ctx.saved_tensors
        # Writing raises the tensor's version, so autograd itself refuses a second backward, and one through another
        # operation that had kept the logits.
        result = logits.detach()
        for rows in _pieces(logits):
            wide = logits[rows].float()
            wide.sub_(log_sum[rows].unsqueeze(1)).exp_()
            kept = (targets[rows] != _IGNORED).float()
            wide.scatter_add_(1, targets[rows].clamp_min(0).unsqueeze(1), -torch.ones_like(kept).unsqueeze(1))
            wide.mul_((kept * gradient).unsqueeze(1))
            result[rows] = wide
        return result, None


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: Any,
) -> torch.Tensor:
    """Mean next-token loss, fp32 scalar, with the signature that `transformers` gives a model's `loss_function`.

    logits: (batch, seq, vocab_size); labels: (batch, seq), int64, -100 where no prediction counts. Position t predicts
    label t + 1. The mean is over what counts, or over `num_items_in_batch` where that is given. Backward overwrites
    `logits`.
    """
    targets = _next_tokens(labels).to(logits.device)
    total: torch.Tensor = _CrossEntropy.apply(logits.reshape(-1, vocab_size), targets)
    count = (targets != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


def _next_tokens(labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:].reshape(-1)


class LossHead(nn.Linear):
    """An output projection that is told the labels of a forward, and then gives the sum of its losses for logits."""

    labels: torch.Tensor | None
    columns: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (batch, seq, features). The logits, or where there are labels the summed loss, an fp32 scalar."""
        labels, self.labels = self.labels, None
        if labels is None:
            return super().forward(input)
        targets = _next_tokens(labels).view(labels.shape)
        return linear_cross_entropy(
            input, self.weight, targets, linear_bias=self.bias, reduction="sum", columns=self.columns
        )


def without_logits(model: Any, columns: int) -> None:
    """Has a causal language model of `transformers` compute its loss without its logits: `columns` of the vocabulary
    have theirs at a time. What a forward with labels then gives as logits is the sum of the losses.

    Raises ModelError where the output projection is no plain linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        got = "no output projection" if head is None else f"{type(head).__name__} as output projection"
        raise ModelError(f"{type(model).__name__} has {got}: --loss-chunk needs a linear layer; leave it out")
    head.__class__ = LossHead
    vars(head).update(labels=None, columns=columns)
    model.register_forward_pre_hook(_tell_labels, with_kwargs=True)
    model.loss_function = _summed_loss


def _tell_labels(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    model.get_output_embeddings().labels = kwargs.get("labels")


def _summed_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: Any,
) -> torch.Tensor:
    count = (_next_tokens(labels) != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return logits / count


def _pieces(logits: torch.Tensor) -> list[slice]:
    rows = max(1, _PIECE_ELEMENTS // logits.shape[-1])
    return [slice(start, min(start + rows, logits.shape[0])) for start in range(0, logits.shape[0], rows)]
