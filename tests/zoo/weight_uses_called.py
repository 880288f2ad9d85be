"""Hooks of the user's own, and calls that come more than once."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from small_models import Batch
from stacks import WIDTH, Block, Stack, both, way
from torch import nn
from torch.nn import functional


@way("hooks that read weights")
class HooksRead(Stack):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.attn.register_forward_pre_hook(lambda m, args: (args[0] * (1 + m.weight.detach().mean()),))
            layer.mlp.register_forward_hook(lambda m, args, out: out + m.weight.sum(0))
            layer.mlp.register_full_backward_hook(lambda m, gi, go: tuple(g * (1 + m.weight.mean()) for g in gi))


@way("a block's hook that reads weights of another")
class HooksReadOthers(Stack):
    def __init__(self) -> None:
        super().__init__()
        for one, other in itertools.pairwise(self.layers):
            one.register_forward_hook(lambda m, args, out, other=[other]: out + other[0].attn.bias)


@way("a block called twice")
class Twice(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for number in (0, 1, 0, 2, 3, 2, 1):
            x = self.layers[number](x)
        return x


@way("a block that calls itself")
class Recursive(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            y = super().forward(x)
            return self(y, depth - 1) if depth else y


def generated_first(model: Any, batch: Batch) -> list[torch.Tensor]:
    """A loop of greedy generation without gradients, then a pass with them over what it has made."""
    model.eval()
    x = batch["x"]
    with torch.no_grad():
        for _ in range(4):
            best = model(x=x)[:, -1].argmax(-1)
            x = torch.cat([x[:, 1:], functional.one_hot(best, WIDTH)[:, None].to(x.dtype)], 1)
    model.train()
    return [x, model(x=x)]


way("generation between steps", call=generated_first, loss=both)(Stack)


@way("two forwards before a backward", call=lambda model, b: [model(**b), model(x=b["x"].flip(1))], loss=both)
class TwoForwards(Stack):
    pass


@way("a teacher without gradients inside")
class Teacher(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.layers).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        with torch.no_grad():
            wanted = x
            for layer in self.teacher:
                wanted = layer(wanted)
        y = x
        for layer in self.layers:
            y = layer(y)
        return (self.head(y).mean() + (y - wanted).square().mean()) * 2


@way("gradients inside forward")
class GradientsInside(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        energy = self.layers[0](x).square().sum()
        (slope,) = torch.autograd.grad(energy, x)
        return super().forward(x.detach() - 0.1 * slope).square().mean()


@way("a module list with holes")
class Holes(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = None  # type: ignore[assignment]  # torch allows it, and models skip such layers
        self.rest = nn.ModuleList([None, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), None])

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.rest):
            x = x if layer is None else layer(x)
        return x
