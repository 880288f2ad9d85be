"""Tokens to contiguous rows of each expert and back: `zeroxide.kernels.permute` under autograd.

The gradient of one way is the other way, so backward takes no scatter with additions whose order could change.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from zeroxide.device.placement import in_host_memory
from zeroxide.kernels import Launcher
from zeroxide.kernels.launchers import launcher
from zeroxide.kernels.permute import combine_reference, combine_rows, gather_reference, gather_rows

__all__ = ["combine", "dispatch", "expert_counts"]


def dispatch(tokens: torch.Tensor, sources: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Row i is token `sources[i]`: (rows, width) of (tokens, width). `positions` says where a token's rows are,
    (tokens, k), -1 for none, as `zeroxide.kernels.permute.expert_order` gives both."""
    found: torch.Tensor = _Dispatch.apply(tokens, sources, positions)
    return found


def combine(rows: torch.Tensor, weights: torch.Tensor, sources: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """For each token the sum of its rows times their `weights`, (tokens, k) in fp32: summed in fp32 in the order of its
    choices, in the dtype of `rows`. A token without rows gets zeros. See `dispatch`."""
    found: torch.Tensor = _Combine.apply(rows, weights, sources, positions)
    return found


def expert_counts(experts: torch.Tensor, number: int) -> list[int]:
    """Rows of each of `number` experts, where routes to -1 have none."""
    return torch.bincount(experts.reshape(-1) + 1, minlength=number + 1)[1:].tolist()


@cache
def _launcher(device: torch.device) -> Launcher:
    return launcher(device)


def _gather(rows: torch.Tensor, sources: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    if in_host_memory(rows):
        return gather_reference(rows, sources, scales)
    return gather_rows(_launcher(rows.device), rows.contiguous(), sources, scales)


def _combine(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    if in_host_memory(rows):
        return combine_reference(rows, positions, weights)
    return combine_rows(_launcher(rows.device), rows.contiguous(), positions, weights)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, sources: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(positions)
        return _gather(tokens, sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (positions,) = ctx.saved_tensors
        return _combine(gradient, positions), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights: torch.Tensor, sources: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, sources, positions)
        return _combine(rows, positions, weights.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, weights, sources, positions = ctx.saved_tensors
        flat = positions.reshape(-1)
        # By their numbers, since a choice among values asks for them, and a rehearsal has none.
        kept = (flat >= 0).nonzero().squeeze(1)
        places = flat.index_select(0, kept)
        scales = weights.new_empty(rows.shape[0])
        scales.index_copy_(0, places, weights.reshape(-1).index_select(0, kept))
        wide = _gather(gradient, sources)
        dots = (wide.float() * rows.float()).sum(1)
        of_weights = torch.zeros_like(weights).view(-1)
        of_weights.index_copy_(0, kept, dots.index_select(0, places))
        return _gather(gradient, sources, scales), of_weights.view_as(weights), None, None
