"""Plain PyTorch beside the engine: DistributedDataParallel, torch's AdamW and torch's clipping, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from families import build
from models import loss_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from traces import Trace

if TYPE_CHECKING:
    from training import Case

PLAIN = {"gpt-reentrant": "gpt", "gpt-nonreentrant": "gpt"}
"""DDP does not take every model with checkpointing; without it, it computes the same."""


def train_plain(case: Case, groups: Callable[[nn.Module], list[dict[str, Any]]]) -> dict[str, Any]:
    """Trains as the case says and leaves its trace. Gradients are exchanged after every micro-batch."""
    model = build(PLAIN.get(case.family, case.family)).to(memory_format=torch.contiguous_format)
    names = {id(param): name for name, param in model.named_parameters()}
    trace = Trace(case.record) if case.record else None
    sizes = trace.watch(model) if trace else None
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3, foreach=False, fused=False)
    losses, norms = [], []
    for step in range(case.steps):
        if trace is not None:
            trace.begin(_state(model, optimizer))
        for micro in range(case.micro_batches):
            loss = loss_of(wrapped(**case.batch(step, micro)))
            (loss / case.micro_batches).backward()
            losses.append(loss.item())
        live = [param for param in model.parameters() if param.grad is not None]
        # In double precision: what torch's fp32 sum loses has nothing to do with the order of ranks.
        norm = get_total_norm(param.grad.double() for param in live if param.grad is not None)
        norms.append(norm.item())
        if case.clip is not None:
            clip_grads_with_norm_(live, case.clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        if trace is not None and sizes is not None:
            updates = {names[id(param)]: int(each["step"]) for param, each in optimizer.state.items()}
            trace.end(sizes, mean=True, norm=norms[-1], updates=updates)
    if trace is not None:
        trace.close(_state(model, optimizer), losses, case.micro_batches)
    return {"losses": losses, "norms": norms}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name, param in model.named_parameters():
        moments = optimizer.state.get(param, {})
        found[name] = {
            "weights": param.detach().clone(),
            "exp_avg": moments.get("exp_avg", torch.zeros_like(param)).detach().clone(),
            "exp_avg_sq": moments.get("exp_avg_sq", torch.zeros_like(param)).detach().clone(),
        }
    return found
