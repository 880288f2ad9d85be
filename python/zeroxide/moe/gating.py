"""Which experts a token goes to, with which weight, and what is left out: DeepSpeed's gates, with sparse routes.

`top1gating` is that of Switch (Fedus et al. 2021, arXiv 2101.03961, section 2.2), `top2gating` that of GShard (Lepikhin
et al. 2020, arXiv 2006.16668, algorithm 1), `topkgating` the same for any number of choices. Nothing here has more
elements than tokens x experts: a capacity is a number that routes are compared with, and no dimension of a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from zeroxide.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DROP_POLICIES", "Routes", "capacity_of", "top1gating", "top2gating", "topkgating", "z_loss"]

DROP_POLICIES = ("probs", "position")
"""Which routes of an expert stay where there are more than its capacity: the most probable, or the first tokens'."""


@dataclass(frozen=True)
class Routes:
    """Where tokens go. All tensors but the last two are (tokens, k)."""

    experts: torch.Tensor
    """int64; -1 where a token has no expert, or was dropped."""
    gates: torch.Tensor
    """fp32 weights of the experts' outputs; 0 where `experts` is -1. Differentiable."""
    locations: torch.Tensor
    """int64: the place of the route in its expert's queue, below `capacity`; -1 where `experts` is -1."""
    l_aux: torch.Tensor
    """fp32 scalar: the loss that balances experts. Differentiable."""
    exp_counts: torch.Tensor
    """int64, (experts,): tokens that chose each expert, those that were dropped included."""
    capacity: int
    """Most routes that an expert takes."""


def capacity_of(tokens: int, experts: int, factor: float, least: int) -> int:
    """Most routes of an expert: `factor` times its even share of `tokens`, rounded up, and at least `least`."""
    return max(math.ceil(tokens / experts * factor), least)


def top1gating(
    logits: torch.Tensor,
    capacity_factor: float,
    min_capacity: int,
    used_token: torch.Tensor | None = None,
    noisy_gate_policy: str | None = None,
    drop_tokens: bool = True,
    use_rts: bool = True,
    ep_group: ProcessGroup | None = None,
) -> Routes:
    """One expert a token; its weight is its probability.

    logits: (tokens, experts), fp32. used_token: (tokens,), 0 where a token is padding and goes nowhere. "RSample" adds
    Gumbel noise to what the choice is made by. With `use_rts` the routes that stay are drawn at random, else they are
    those of the first tokens. `ep_group` are ranks whose largest capacity counts where nothing is dropped.
    """
    gates = functional.softmax(logits, dim=1)
    chosen_by = logits + _gumbel(logits) if noisy_gate_policy == "RSample" else gates
    experts = _without_unused(chosen_by.argmax(dim=1, keepdim=True), used_token)
    score = torch.rand(experts.shape, device=logits.device) if use_rts and drop_tokens else None
    return _routes(gates, experts, capacity_factor, min_capacity, drop_tokens, score, ep_group, normalise=False)


def top2gating(
    logits: torch.Tensor,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: ProcessGroup | None = None,
    top2_2nd_expert_sampling: bool = True,
    used_token: torch.Tensor | None = None,
) -> Routes:
    """Two experts a token; their weights are their probabilities, relative to those of the two that were not dropped.

    The second is drawn by Gumbel noise on the logits (GShard's random routing) where `top2_2nd_expert_sampling` says
    so. All first choices come before all second ones. The balance loss counts first choices. See `top1gating`.
    """
    gates = functional.softmax(logits, dim=1)
    first = gates.argmax(dim=1, keepdim=True)
    chosen_by = logits + _gumbel(logits) if top2_2nd_expert_sampling else logits
    second = chosen_by.scatter(1, first, float("-inf")).argmax(dim=1, keepdim=True)
    experts = _without_unused(torch.cat([first, second], dim=1), used_token)
    # Of earlier choices first: a score that falls from one column to the next.
    score = torch.tensor([1.0, 0.0], device=logits.device).expand(experts.shape)
    return _routes(gates, experts, capacity_factor * 2, min_capacity, drop_tokens, score, ep_group, balanced=1)


def topkgating(
    logits: torch.Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: ProcessGroup | None = None,
    drop_policy: str = "probs",
    used_token: torch.Tensor | None = None,
) -> Routes:
    """The `k` most probable experts of a token; weights as in `top2gating`.

    drop_policy: see `DROP_POLICIES`. "probs" goes by probability, where DeepSpeed goes by the logit, which may be
    negative and then counts for less than that of a token that did not choose the expert. See `top1gating`.
    """
    if drop_policy not in DROP_POLICIES:
        raise ModelError(f'moe: drop_policy: expected "probs" or "position", got {drop_policy!r}', name="drop_policy")
    gates = functional.softmax(logits, dim=1)
    experts = _without_unused(logits.topk(k, dim=1).indices, used_token)
    score = gates.detach().gather(1, experts.clamp(min=0)) if drop_policy == "probs" and drop_tokens else None
    return _routes(gates, experts, capacity_factor * k, min_capacity, drop_tokens, score, ep_group)


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """The mean of the squared log of each token's sum of exponentials (ST-MoE, Zoph et al. 2022, arXiv 2202.08906,
    equation 5), fp32: it keeps logits small."""
    return logits.float().logsumexp(dim=1).square().mean()


def _gumbel(like: torch.Tensor) -> torch.Tensor:
    return -torch.empty_like(like).exponential_().log()


def _without_unused(experts: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
    if used is None:
        return experts
    if used.numel() != experts.shape[0]:
        raise ModelError(
            f"moe: used_token has {used.numel()} elements: expected one for each of the {experts.shape[0]} tokens",
            name="used_token",
        )
    return torch.where(used.reshape(-1, 1).to(experts.device) != 0, experts, -1)


def _routes(
    gates: torch.Tensor,
    experts: torch.Tensor,
    factor: float,
    least: int,
    drop_tokens: bool,
    score: torch.Tensor | None,
    ep_group: ProcessGroup | None,
    *,
    balanced: int | None = None,
    normalise: bool = True,
) -> Routes:
    """The routes to `experts`, of which those with the highest score, or the first, stay.

    gates: probabilities, (tokens, experts). balanced: how many of the choices the balance loss counts; None for all.
    """
    (tokens, number), ways = gates.shape, experts.shape[1]
    counted = experts[:, :balanced]
    counts = _counts(experts, number)
    share = _counts(counted, number).to(gates.dtype) / max(1, tokens)
    # GShard, equation 4, with the mean over experts times their number squared: 1 where all are chosen alike.
    l_aux = (gates.mean(dim=0) * share).sum() * number / counted.shape[1]
    locations = _locations(experts, number, score)
    if drop_tokens:
        capacity = capacity_of(tokens, number, factor, least)
        experts = torch.where(locations < capacity, experts, -1)
    else:
        capacity = _largest(counts, ep_group)
    locations = torch.where(experts < 0, -1, locations)
    weights = gates.gather(1, experts.clamp(min=0)).masked_fill(experts < 0, 0.0)
    if normalise and ways > 1:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    return Routes(experts, weights, locations, l_aux, counts, capacity)


def _counts(experts: torch.Tensor, number: int) -> torch.Tensor:
    """How many routes go to each expert; those to -1 to none."""
    return torch.bincount(experts.reshape(-1) + 1, minlength=number + 1)[1:]


def _locations(experts: torch.Tensor, number: int, score: torch.Tensor | None) -> torch.Tensor:
    """The place of every route among those to the same expert: by falling score, then by token, then by choice."""
    flat = torch.where(experts < 0, number, experts).reshape(-1)
    if score is None:
        order = flat.argsort(stable=True)
    else:
        order = score.reshape(-1).argsort(descending=True, stable=True)
        order = order[flat[order].argsort(stable=True)]
    counts = torch.bincount(flat, minlength=number + 1)
    first = counts.cumsum(0) - counts
    places = torch.empty_like(flat)
    places[order] = torch.arange(flat.numel(), device=flat.device) - first[flat[order]]
    return places.view_as(experts)


def _largest(counts: torch.Tensor, ep_group: ProcessGroup | None) -> int:
    largest = counts.max()
    if ep_group is not None:
        import torch.distributed as dist

        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ep_group)
    return int(largest)
