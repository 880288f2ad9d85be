"""A layer of experts: DeepSpeed's `MoE`, its gate, and what brings tokens to experts and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zeroxide.device.placement import without_autocast
from zeroxide.errors import ModelError
from zeroxide.kernels.permute import expert_order
from zeroxide.moe.dispatch import combine, dispatch, expert_counts
from zeroxide.moe.exchange import ExpertExchange
from zeroxide.moe.experts import Experts
from zeroxide.moe.gating import DROP_POLICIES, Routes, top1gating, top2gating, topkgating, z_loss

__all__ = ["MOELayer", "MoE", "TopKGate"]

JITTER = 1e-2
"""Noise of "Jitter": the gate's input is multiplied by numbers from 1 - JITTER to 1 + JITTER (Switch, section 2.2)."""


class TopKGate(nn.Module):
    """Decides in fp32, whatever the model computes in, where tokens go: `zeroxide.moe.gating` over a linear layer."""

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        top2_2nd_expert_sampling: bool = True,
        drop_policy: str = "probs",
        z_loss_coefficient: float = 0.0,
    ) -> None:
        super().__init__()
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.k = k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.noisy_gate_policy = noisy_gate_policy
        self.drop_tokens = drop_tokens
        self.use_rts = use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling
        self.drop_policy = drop_policy
        self.z_loss_coefficient = z_loss_coefficient

    def forward(self, tokens: torch.Tensor, used_token: torch.Tensor | None = None) -> Routes:
        """tokens: (tokens, model_dim), of any float dtype. used_token: see `top1gating`."""
        with without_autocast(tokens.device):
            given = tokens.float()
            if self.noisy_gate_policy == "Jitter" and self.training:
                given = given * torch.empty_like(given).uniform_(1.0 - JITTER, 1.0 + JITTER)
            logits = functional.linear(given, self.wg.weight.float())
            factor = self.capacity_factor if self.training else self.eval_capacity_factor
            least, drops = self.min_capacity, self.drop_tokens
            if self.k == 1:
                noise = self.noisy_gate_policy if self.training else None
                routes = top1gating(logits, factor, least, used_token, noise, drops, self.use_rts)
            elif self.k == 2:
                sampled = self.top2_2nd_expert_sampling
                routes = top2gating(logits, factor, least, drops, None, sampled, used_token)
            else:
                routes = topkgating(logits, self.k, factor, least, drops, None, self.drop_policy, used_token)
            if self.z_loss_coefficient:
                l_aux = routes.l_aux + self.z_loss_coefficient * z_loss(logits)
                routes = Routes(
                    routes.experts, routes.gates, routes.locations, l_aux, routes.exp_counts, routes.capacity
                )
        return routes


class MOELayer(nn.Module):
    """Tokens to their experts, which may be on other ranks, and back."""

    def __init__(self, gate: TopKGate, experts: Experts, num_experts: int, ep_size: int) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.num_experts = num_experts
        self.ep_size = ep_size
        self.exchange: ExpertExchange | None = None
        """What carries tokens to experts on other ranks; None where all are here."""
        self.l_aux: torch.Tensor | None = None
        self.exp_counts: torch.Tensor | None = None
        self.capacity = 0

    def forward(self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None) -> torch.Tensor:
        """(..., model_dim), in the dtype of `hidden_states`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        routes = self.gate(tokens, used_token)
        self.l_aux, self.exp_counts, self.capacity = routes.l_aux, routes.exp_counts, routes.capacity
        sources, positions = expert_order(routes.experts)
        counts = expert_counts(routes.experts, self.num_experts)
        rows = dispatch(tokens, sources, positions)
        if self.exchange is None:
            made = self.experts(rows, counts)
        else:
            made = self.exchange.through(self.experts, rows, counts)
        return combine(made.to(tokens.dtype), routes.gates, sources, positions).view(hidden_states.shape)


class MoE(nn.Module):
    """A layer of experts, to be used in place of a feed-forward layer: DeepSpeed's `deepspeed.moe.layer.MoE`.

    hidden_size: width of a token. expert: a module that takes (rows, hidden_size) and gives as much, or a tuple with
    that first; there are `num_experts` copies of it. ep_size: ranks that experts are spread over, a divisor of their
    number; the engine spreads them. k: experts of a token. capacity_factor, eval_capacity_factor, min_capacity: an
    expert takes at most max(ceil(tokens / num_experts * factor * k), min_capacity) of a rank's tokens in training and
    in evaluation; the others are dropped, and have zeros from it. drop_tokens: False lets experts take all. use_rts:
    whether it is drawn which tokens are dropped (k = 1), or the last ones are. noisy_gate_policy: "Jitter", "RSample"
    (k = 1) or None. use_residual: adds a copy of `expert` that all tokens pass, weighed against the chosen ones by a
    learned coefficient. top2_2nd_expert_sampling: whether the second of two experts is drawn.

    drop_policy (k > 2): "probs" or "position", see `zeroxide.moe.gating`. z_loss_coefficient: times `z_loss`, added to
    the balance loss.

    Raises ModelError for numbers that do not go together, and for `use_tutel` and `enable_expert_tensor_parallelism`.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        drop_policy: str = "probs",
        z_loss_coefficient: float = 0.0,
    ) -> None:
        super().__init__()
        factors = {"capacity_factor": capacity_factor, "eval_capacity_factor": eval_capacity_factor}
        _check(num_experts, ep_size, k, factors, min_capacity, noisy_gate_policy, drop_policy, z_loss_coefficient)
        _refuse("use_tutel", use_tutel, "routes are sparse without it: leave it out")
        _refuse("enable_expert_tensor_parallelism", enable_expert_tensor_parallelism, "it is not built in zeroxide yet")
        self.use_residual = use_residual
        self.ep_size = ep_size
        self.num_experts = num_experts
        self.num_local_experts = num_experts
        """Experts on this rank: all of them until an engine spreads them."""
        self.expert_group_name = f"ep_size_{ep_size}"
        gate = TopKGate(
            hidden_size,
            num_experts,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            top2_2nd_expert_sampling,
            drop_policy,
            z_loss_coefficient,
        )
        experts = Experts(expert, num_experts, self.expert_group_name)
        self.deepspeed_moe = MOELayer(gate, experts, num_experts, ep_size)
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """What DeepSpeed's engine calls; here `zeroxide.initialize` spreads experts, by the mesh of all ranks.

        Raises ModelError for `use_data_before_expert_parallel_`: experts are spread over neighbours.
        """
        _refuse("use_data_before_expert_parallel_", use_data_before_expert_parallel_, "experts are on neighbours")

    def spread(self, exchange: ExpertExchange) -> None:
        """Keeps this rank's experts alone; the others' are reached through `exchange`."""
        self.num_local_experts = self.num_experts // self.ep_size
        self.deepspeed_moe.experts.keep(exchange.position * self.num_local_experts, self.num_local_experts)
        self.deepspeed_moe.exchange = exchange

    def forward(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(what the layer makes of `hidden_states`, of the same shape and dtype; the balance loss, fp32; tokens that
        chose each expert, (num_experts,)).

        used_token: one number for each token, 0 where it is padding. Tokens and counts are this rank's.
        """
        output = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            beside: Any = self.mlp(hidden_states)
            beside = beside[0] if isinstance(beside, tuple) else beside
            shares = functional.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * shares[..., 0:1] + beside * shares[..., 1:]
        l_aux, counts = self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts
        assert l_aux is not None, "forward has just set it"
        assert counts is not None, "forward has just set it"
        return output, l_aux, counts


def _check(
    num_experts: int,
    ep_size: int,
    k: int,
    factors: dict[str, float],
    min_capacity: int,
    noisy_gate_policy: str | None,
    drop_policy: str,
    z_loss_coefficient: float,
) -> None:
    if num_experts < 1:
        raise _wrong("num_experts", "at least 1", num_experts)
    if ep_size < 1 or num_experts % ep_size:
        raise _wrong("ep_size", f"a divisor of num_experts = {num_experts}", ep_size)
    if not 1 <= k <= num_experts:
        raise _wrong("k", f"1 to num_experts = {num_experts}", k)
    for name, factor in factors.items():
        if not (math.isfinite(factor) and factor > 0):
            raise _wrong(name, "a positive number", factor)
    if min_capacity < 0:
        raise _wrong("min_capacity", "at least 0", min_capacity)
    if noisy_gate_policy not in (None, "None", "Jitter", "RSample"):
        raise _wrong("noisy_gate_policy", 'None, "Jitter" or "RSample"', noisy_gate_policy)
    if noisy_gate_policy == "RSample" and k > 1:
        raise _wrong("noisy_gate_policy", 'None or "Jitter" where k is over 1', noisy_gate_policy)
    if drop_policy not in DROP_POLICIES:
        raise _wrong("drop_policy", '"probs" or "position"', drop_policy)
    if not (math.isfinite(z_loss_coefficient) and z_loss_coefficient >= 0):
        raise _wrong("z_loss_coefficient", "a number from 0 on", z_loss_coefficient)


def _wrong(name: str, expected: str, got: object) -> ModelError:
    return ModelError(f"MoE: {name}: expected {expected}, got {got!r}", name=name)


def _refuse(name: str, given: bool, why: str) -> None:
    if given:
        raise ModelError(f"MoE: {name}: expected False, got {given!r}: {why}", name=name)
