"""Train a tiny GPT on text over several ranks with zeroxide and report its losses.

One argument: a JSON object

    {"text": path of a text file, "steps": 200, "seed": 0, "order": 0, "config": zeroxide's config, "rows": 4,
     "columns": 64, "threads": 1}

Tokens are bytes. Every rank takes batches of its own; `order` decides which, `seed` the initial weights. The last tenth
of the text is left out of training, and the loss of 64 rows of it is told at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import process
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import zeroxide

VOCABULARY, WIDTH, HEADS, LAYERS = 256, 128, 4, 4
HELD_OUT = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, columns, _ = hidden.shape
        parts = self.qkv(self.first(hidden)).view(rows, columns, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*parts.unbind(), is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).reshape(rows, columns, WIDTH))
        return hidden + self.down(functional.gelu(self.up(self.second(hidden))))


class Gpt(nn.Module):
    """Mean cross-entropy of the next byte."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(columns, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for name, param in self.named_parameters():
            if param.dim() > 1:
                nn.init.normal_(
                    param, std=0.02 / (2 * LAYERS) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(ids[:, :-1]) + self.places.weight
        for block in self.h:
            hidden = block(hidden)
        return functional.cross_entropy(self.head(self.norm(hidden)).float().flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    text = torch.frombuffer(bytearray(Path(spec["text"]).read_bytes()), dtype=torch.uint8).long()
    split = len(text) * 9 // 10
    columns = spec["columns"] + 1

    def rows_of(part: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(0, len(part) - columns, (count,), generator=generator)
        return torch.stack([part[start : start + columns] for start in starts.tolist()])

    torch.manual_seed(spec["seed"])
    config = {"bf16": {"enabled": True}, "steps_per_print": None, **spec["config"]}
    engine, *_ = zeroxide.initialize(model=Gpt(spec["columns"]), config=config, lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(spec["steps"]):
        generator = torch.Generator().manual_seed((spec["order"] * spec["steps"] + step) * world + rank)
        loss = engine(rows_of(text[:split], spec["rows"], generator))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    sent = engine.exchanged_bytes() / spec["steps"]
    engine.eval()
    with torch.no_grad():
        held_out = engine(rows_of(text[split:], HELD_OUT, torch.Generator().manual_seed(1))).item()
    parameters = sum(unit.numel for unit in engine.plan().units)
    dist.barrier()
    engine.destroy()
    process.emit({"losses": losses, "held_out": held_out, "sent": sent, "parameters": parameters})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
