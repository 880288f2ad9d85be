"""Whole steps on a GPU: the engine with its state in host memory beside torch with everything on the GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import zeroxide

STEPS = 4
WARM = 2
MODES: dict[str, dict[str, Any]] = {
    "weights stay on the GPU, state in host memory": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "weights come for each use, all in host memory": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
    },
}


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, length, width = hidden.shape
        parts = self.qkv(self.before(hidden)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return hidden + self.down(functional.gelu(self.up(self.after(hidden))))


class Model(nn.Module):
    """Blocks between an embedding and a head; returns the loss."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Median seconds of a step, and the most bytes that torch held on the device."""
    taken = []
    for number in range(WARM + STEPS):
        if number == WARM:
            torch.accelerator.reset_peak_memory_stats(device)
        torch.accelerator.synchronize(device)
        begun = time.perf_counter()
        step()
        torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[WARM:]), torch.accelerator.max_memory_allocated(device)


def plain(model: nn.Module, ids: torch.Tensor, fused: bool) -> Callable[[], object]:
    """A step of torch's AdamW on bf16 weights."""
    model.to(ids.device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        model(ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(
    device: str = "cuda",
    *,
    width: int = 2048,
    layers: int = 16,
    vocabulary: int = 32000,
    rows: int = 8,
    length: int = 1024,
) -> list[str]:
    """Tokens a second, memory on the device and bytes between it and the host, of a step of a bf16 model."""
    where = torch.device(device)
    ids = torch.randint(0, vocabulary, (rows, length), device=where)
    parameters = sum(each.numel() for each in Model(width, layers, vocabulary).parameters())
    lines = [
        f"{parameters / 1e6:.0f} M parameters, bf16, {rows} x {length} tokens, clipping, median of {STEPS} steps.",
        "",
        "| what | tokens/s | share of torch | peak on the device GB | bytes up, down a parameter and step |",
        "|---|---|---|---|---|",
    ]
    begun, peak = timed(plain(Model(width, layers, vocabulary), ids, fused=device == "cuda"), where)
    tokens = ids.numel()
    lines.append(f"| torch, fused AdamW, all on the GPU | {tokens / begun:.0f} | 1 | {peak / 1e9:.2f} | 0, 0 |")
    for name, zero in MODES.items():
        gc.collect()
        torch.accelerator.empty_cache()
        config = {
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "zeroxide": {"device": device},
        }
        engine, *_ = zeroxide.initialize(model=Model(width, layers, vocabulary), config=config)

        def step(engine: Any = engine) -> None:
            engine.backward(engine(ids))
            engine.step()

        seconds, peak = timed(step, where)
        moved = engine.device_traffic()
        each = [moved[way] / parameters / (WARM + STEPS) for way in ("up", "down")]
        engine.destroy()
        lines.append(
            f"| zeroxide, {name} | {tokens / seconds:.0f} | {begun / seconds:.2f} | {peak / 1e9:.2f} "
            f"| {each[0]:.2f}, {each[1]:.2f} |"
        )
    return lines
