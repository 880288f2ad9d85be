"""Gated experts whose weights are two 3-D parameters, as transformers 5 has them, in one pass over the experts.

One expert after the other takes its tokens, and adds what it makes of them to the result: nothing of the size of
tokens x choices x width is made but what the first product gives, which backward needs. The weight of a choice has its
gradient from the product that backward needs anyway: with y = h W^T and an output w y, d w = g . (h W^T) = (g W) . h,
so y is not kept (SonicMoE, arXiv 2512.14080, section 3, has the same).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from zeroxide.device.placement import autocast_dtype

__all__ = ["gated_experts"]

Activation = Callable[[torch.Tensor], torch.Tensor]


def gated_experts(
    tokens: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: Activation = functional.silu,
    apply_gate: Activation | None = None,
) -> torch.Tensor:
    """For each token the sum over its choices of weight * (activation(x G^T) * (x U^T)) D^T, (tokens, width), in the
    dtype of `tokens`.

    experts: int64, (tokens, k), each a number of an expert, or below 0 or not below their number for none. weights:
    (tokens, k). gate_up: (experts, 2 * features, width), G above U. down: (experts, width, features). The sum is taken
    in fp32 in the order of the experts. apply_gate: what makes (rows, features) of both products side by side, (rows,
    2 * features), where that is something else.
    """
    dtype = autocast_dtype() or tokens.dtype
    order, counts = _by_expert(experts, gate_up.shape[0])
    made: torch.Tensor = _GatedExperts.apply(
        tokens.to(dtype), weights.float(), gate_up, down, order, counts, activation, apply_gate
    )
    return made.to(tokens.dtype)


def _by_expert(experts: torch.Tensor, number: int) -> tuple[torch.Tensor, list[int]]:
    """The choices, counted along the rows of (tokens, k), in the order of their experts, and how many each has."""
    flat = experts.reshape(-1)
    flat = torch.where(flat < 0, number, flat)
    counts = torch.bincount(flat, minlength=number + 1)[:number].tolist()
    return flat.argsort(stable=True)[: sum(counts)], counts


def _parts(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end) of the experts that have rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, start, start + count
        start += count


class _GatedExperts(torch.autograd.Function):
    """`tokens` are in the dtype of all products; weights are cast an expert at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        order: torch.Tensor,
        counts: list[int],
        activation: Activation,
        apply_gate: Activation | None,
    ) -> torch.Tensor:
        ways = weights.shape[1]
        sources, scales = order // ways, weights.reshape(-1)[order]
        projected = tokens.new_empty(order.numel(), gate_up.shape[1])
        total = tokens.new_zeros(tokens.shape, dtype=torch.float32)
        with torch._C.DisableTorchFunctionSubclass():
            for expert, start, end in _parts(counts):
                rows = sources[start:end]
                both = projected[start:end]
                torch.mm(tokens.index_select(0, rows), gate_up[expert].to(tokens.dtype).t(), out=both)
                if apply_gate is None:
                    gate, up = both.chunk(2, dim=1)
                    hidden = activation(gate) * up
                else:
                    hidden = apply_gate(both)
                made = hidden.mm(down[expert].to(tokens.dtype).t())
                total.index_add_(0, rows, made.float().mul_(scales[start:end, None]))
        ctx.save_for_backward(tokens, scales, gate_up, down, order, projected)
        ctx.counts, ctx.bent, ctx.ways = counts, (activation, apply_gate), ways
        return total.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        tokens, scales, gate_up, down, order, projected = ctx.saved_tensors
        sources = order // ctx.ways
        of_tokens = tokens.new_zeros(tokens.shape, dtype=torch.float32)
        of_weights = tokens.new_zeros(tokens.shape[0] * ctx.ways, dtype=torch.float32)
        with torch._C.DisableTorchFunctionSubclass():
            of_gate_up = torch.empty_like(gate_up) if ctx.needs_input_grad[2] else None
            of_down = torch.empty_like(down) if ctx.needs_input_grad[3] else None
            for expert, count in enumerate(ctx.counts):
                if not count:
                    for each in (of_gate_up, of_down):
                        if each is not None:
                            each[expert].zero_()
            for expert, start, end in _parts(ctx.counts):
                rows, scale = sources[start:end], scales[start:end, None]
                given = gradient.index_select(0, rows)
                hidden, slope = _hidden(projected[start:end], *ctx.bent)
                weight = down[expert].to(tokens.dtype)
                of_hidden = given.mm(weight)
                of_weights[order[start:end]] = (of_hidden.float() * hidden.float()).sum(1)
                of_hidden = of_hidden.mul_(scale.to(of_hidden.dtype))
                if of_down is not None:
                    _product(given.mul_(scale.to(given.dtype)).t(), hidden, of_down[expert])
                both = slope(of_hidden)
                if of_gate_up is not None:
                    _product(both.t(), tokens.index_select(0, rows), of_gate_up[expert])
                of_tokens.index_add_(0, rows, both.mm(gate_up[expert].to(tokens.dtype)).float())
        of_weights = of_weights.view(tokens.shape[0], ctx.ways)
        return of_tokens.to(tokens.dtype), of_weights, of_gate_up, of_down, None, None, None, None


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    if left.dtype is out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left.mm(right))


def _hidden(
    both: torch.Tensor, activation: Activation, apply_gate: Activation | None
) -> tuple[torch.Tensor, Activation]:
    """What the gate makes of both products, and what makes of a gradient of that the gradient of both."""
    if apply_gate is not None:
        with torch.enable_grad():
            given = both.detach().requires_grad_()
            found = apply_gate(given)
        return found.detach(), lambda gradient: torch.autograd.grad(found, given, gradient)[0]
    gate, up = both.chunk(2, dim=1)
    with torch.enable_grad():
        bent = gate.detach().requires_grad_()
        active = activation(bent)
    (by_gate,) = torch.autograd.grad(active, bent, up)
    by_up = active.detach()

    def slope(gradient: torch.Tensor) -> torch.Tensor:
        found = torch.empty_like(both)
        torch.mul(by_gate, gradient, out=found[:, : gate.shape[1]])
        torch.mul(by_up, gradient, out=found[:, gate.shape[1] :])
        return found

    return by_up * up, slope
