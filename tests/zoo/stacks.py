"""What the models share that use their weights in unusual ways, one way each: whoever uses a weight, it is there.

Every model takes `x` of shape (rows, length, WIDTH) and has blocks in a module list, as what is cut into units has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from small_models import Batch, Small
from torch import nn

WIDTH, LENGTH, ROWS, WORDS = 16, 6, 2, 23
WAYS: dict[str, Small] = {}


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(ROWS, LENGTH, WIDTH, generator=generator)}


def words(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(0, WORDS, (ROWS, LENGTH), generator=generator)}


def way(name: str, batch: Callable[[int], Batch] = batch, **more: Any) -> Callable[[Callable[[], nn.Module]], Any]:
    """Registers a model under a name. `more` are the other fields of Small."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def seeded() -> nn.Module:
            torch.manual_seed(0)
            return build().train()

        WAYS[name] = Small(name, seeded, batch, name, **more)
        return build

    return register


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.tanh(self.mlp(torch.tanh(self.attn(self.norm(x)))))


class Stack(nn.Module):
    """An embedding of the input, blocks one after the other, a head."""

    block: type[nn.Module] = Block
    layers_count = 4

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(self.block() for _ in range(self.layers_count))
        self.head = nn.Linear(WIDTH, 3)

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.blocks(self.first(x)))


def stack_of(block: type[nn.Module]) -> type[Stack]:
    return type("StackOf" + block.__name__, (Stack,), {"block": block})


def evaluated_first(model: Any, batch: Batch) -> list[torch.Tensor]:
    """A pass for evaluation, then one for training."""
    model.eval()
    with torch.no_grad():
        first = model(**batch)
    model.train()
    return [first, model(**batch)]


def both(model: nn.Module, outputs: list[torch.Tensor]) -> torch.Tensor:
    return outputs[0].mean() + outputs[1].square().mean()
