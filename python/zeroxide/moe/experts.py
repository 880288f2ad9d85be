"""The experts of a layer as modules of their own, each of which sees its tokens as contiguous rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

__all__ = ["Experts", "is_spread", "mark_expert"]


def mark_expert(param: nn.Parameter, group_name: str) -> None:
    """Says, in DeepSpeed's words, that the parameter is an expert's: it is reduced over ranks with the same expert."""
    param.allreduce = False  # type: ignore[attr-defined]
    param.group_name = group_name  # type: ignore[attr-defined]


def is_spread(param: torch.Tensor) -> bool:
    """Whether the parameter is an expert's, and other ranks have other experts."""
    return not getattr(param, "allreduce", True) and getattr(param, "group_name", "ep_size_1") != "ep_size_1"


class RunsExperts(Protocol):
    """Which experts of a layer run."""

    def used(self, counts: Sequence[int]) -> list[bool]:
        """Whether each expert runs, of which there are `counts` tokens; one that has some does."""


class Experts(nn.Module):
    """Copies of one module, which begin alike.

    Every expert runs in every forward, also one without tokens: so ranks whose tokens go elsewhere gather the same
    weights in the same order, and every expert has a gradient. Where `routing` says otherwise, it is those that it
    names.
    """

    routing: RunsExperts | None = None
    """What says which experts run; None for all."""

    def __init__(self, expert: nn.Module, num_experts: int, group_name: str) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleDict({str(number): copy.deepcopy(expert) for number in range(num_experts)})
        for param in self.parameters():
            mark_expert(param, group_name)

    def keep(self, first: int, number: int) -> None:
        """Forgets all experts but `number` of them from the one with number `first` on; they keep their names."""
        kept = {str(each) for each in range(first, first + number)}
        for name in [name for name in self.deepspeed_experts if name not in kept]:
            del self.deepspeed_experts[name]

    def forward(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """rows: those of each expert after those of the one before, (sum of `counts`, width). What experts make of
        them, in the same order; of an expert that gives a tuple, its first."""
        made = []
        used = [True] * len(counts) if self.routing is None else self.routing.used(counts)
        parts = torch.split(rows, counts)
        for expert, part, runs in zip(self.deepspeed_experts.values(), parts, used, strict=True):
            if runs:
                found = expert(part)
                made.append(found[0] if isinstance(found, tuple) else found)
        return torch.cat(made) if made else rows
