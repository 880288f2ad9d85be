"""A loss over all tokens of the sequences that ranks share, from each rank's mean over its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from zeroxide.parallel.sequence.parallel_state import current_state

__all__ = ["average_over_tokens"]


def average_over_tokens(loss: torch.Tensor, tokens: torch.Tensor | int, group: Any = None) -> torch.Tensor:
    """sum of loss_r * tokens_r over the ranks r of the group, over the sum of tokens_r: the same on all of them.

    loss: this rank's mean over its own tokens; what it is does not matter where there are none. tokens: how many of
    them count (`(shift_labels != -100).sum()`). group: ranks that share sequences, those of
    `initialize_sequence_parallel` if None; where there are none of these, the result is `loss`.

    Backward gives this rank's loss the weight ranks * tokens_r / all tokens: gradients that are averaged over the ranks
    afterwards, as the engine does, are those of the result. Where no token counts at all, the result is 0.
    """
    if group is None:
        state = current_state()
        if state is None:
            return loss
        group = state.sequence_group
    count = torch.as_tensor(tokens, device=loss.device).detach().to(torch.float64).reshape(())
    result: torch.Tensor = _Average.apply(loss, count, group)
    return result


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, count: torch.Tensor, group: Any) -> torch.Tensor:
        # A mean over no tokens is not a number.
        total = torch.where(count > 0, loss.detach().double().reshape(()) * count, 0.0)
        both = torch.stack([total, count])
        every = [torch.empty_like(both) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, both, group=group)
        # In the order of the ranks: the same bits on all of them.
        summed = torch.stack(every).sum(0)
        tokens = summed[1].clamp(min=1)
        ctx.weight = (len(every) * count / tokens).to(loss.dtype)
        return (summed[0] / tokens).to(loss.dtype).reshape(loss.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.where(ctx.weight > 0, gradient * ctx.weight, 0.0), None, None
