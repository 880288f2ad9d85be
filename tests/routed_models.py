"""A small model of experts of which few have tokens, and its training by plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zeroxide.moe import MoE

WORDS, WIDTH, EXPERTS, LAYERS = 32, 16, 8, 2
LR, DECAY = 1e-2, 0.1
EPS = 1e-3
"""Beside which the noise of gradients that cancel, as those of experts not chosen have in the gate, is nothing."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        expert = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.moe = MoE(WIDTH, expert, EXPERTS, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.moe(self.norm(hidden))[0]


class Routed(nn.Module):
    """With one token in a micro-batch, two experts of a layer have work."""

    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS)
        self.recomputes = recomputes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(ids)
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if self.recomputes else layer(hidden)
        return functional.cross_entropy(self.head(hidden).float().flatten(0, 1), ids.flatten())


def build(recomputes: bool = False) -> Routed:
    torch.manual_seed(3)
    model = Routed(recomputes)
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    return model


def batches(number: int, seed: int = 11) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WORDS, (1, 1), generator=generator) for _ in range(number)]


def train_plainly(
    steps: list[list[torch.Tensor]], *, leave_out: bool, clip: float | None = None
) -> tuple[Routed, list[float], list[set[tuple[int, int]]]]:
    """The model in float64 after a step of AdamW over each list of micro-batches, the losses, and which (layer, expert)
    had tokens in each step. With `leave_out` an expert without tokens has no gradient, else one of zeros."""
    model = build().double()
    experts = {
        (layer, number): expert
        for layer, block in enumerate(model.layers)
        for number, expert in enumerate(block.moe.deepspeed_moe.experts.deepspeed_experts.values())
    }
    having: set[tuple[int, int]] = set()
    for place, expert in experts.items():
        expert.register_forward_pre_hook(lambda _, rows, place=place: having.add(place) if len(rows[0]) else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, eps=EPS, foreach=False)
    losses, used = [], []
    for each in steps:
        optimizer.zero_grad(set_to_none=True)
        having.clear()
        for ids in each:
            loss = model(ids)
            (loss / len(each)).backward()
            losses.append(loss.item())
        used.append(set(having))
        for place, expert in experts.items():
            for param in expert.parameters():
                assert param.grad is not None
                if place not in having:
                    assert not param.grad.any()
                    param.grad = None if leave_out else param.grad
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model, losses, used


def config_for(folder: Path, mode: str, home: str = "nvme", **own: Any) -> dict[str, Any]:
    """home: of weights and state, "nvme", "cpu", or "state" for state alone on disk, at stage 2."""
    disk = {"device": "nvme", "nvme_path": str(folder)}
    zero: dict[str, Any] = {"stage": 3}
    if home == "nvme":
        zero |= {"offload_param": disk, "offload_optimizer": disk}
    elif home == "state":
        zero = {"stage": 2, "offload_optimizer": disk}
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "eps": EPS}},
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "zeroxide": {"threads": 1, "unrouted_experts": mode, "tile_bytes": 4096, **own},
        "steps_per_print": None,
    }
