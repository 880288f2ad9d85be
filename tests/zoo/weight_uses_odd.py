"""Calls that go round a module's own call, other people's hooks on saved tensors, threads, failures."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from stacks import WIDTH, Block, Stack, way
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional


@way("a block's forward called directly")
class ForwardDirectly(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return x


@way("parts' forward called directly")
class PartsForwardDirectly(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.mlp.forward(torch.tanh(nn.Linear.forward(self.attn, self.norm(x)))))


@way("save_on_cpu around every block")
class SavedOnCpu(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            with save_on_cpu():
                x = layer(x)
        return x


@way("hooks on saved tensors around and inside blocks")
class OwnSavedHooks(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with saved_tensors_hooks(lambda t: (t.clone(), t.shape), lambda kept: kept[0].view(kept[1])):
                inner = torch.tanh(self.attn(self.norm(x)))
            return x + torch.tanh(self.mlp(inner))

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        with saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            return super().blocks(x)


def reading(read: Callable[[nn.Linear], torch.Tensor]) -> type[Stack]:
    class Reading(Stack):
        class block(Block):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + torch.tanh(self.mlp(x) @ read(self.attn))

    return Reading


way("a child's weight by .T")(reading(lambda linear: linear.weight.T))
way("a child's weight by .data")(reading(lambda linear: linear.weight.data))
way("a child's weight by detach")(reading(lambda linear: linear.weight.detach()))
way("a child's weight by parameters()")(reading(lambda linear: next(linear.parameters())))
way("a child's weight by state_dict()")(reading(lambda linear: linear.state_dict()["weight"]))
way("a child's weight by numpy()")(reading(lambda linear: torch.from_numpy(linear.weight.detach().numpy().copy())))
way("a child's weight by tolist()")(reading(lambda linear: torch.tensor(linear.weight.tolist())))
way("a child's weight by index")(reading(lambda linear: torch.stack([linear.weight[:, n] for n in range(WIDTH)])))
way("a child's weight by an out argument")(
    reading(lambda linear: torch.mul(linear.weight.detach(), 2.0, out=torch.empty(WIDTH, WIDTH)))
)
way("a child's weight in float64")(reading(lambda linear: linear.weight.double().float()))


@way("the weights of all blocks stacked")
class Stacked(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.stack([layer.attn.weight for layer in self.layers])
        flat = torch.cat([param.flatten() for param in self.layers.parameters()])
        return torch.einsum("brw,low->bro", x, weights) + super().blocks(x) * flat.square().mean()


@way("a block that fails, and a forward that goes on")
class GoesOn(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.attn(x)
            if self.fails:
                raise ValueError("on purpose")
            return x + torch.tanh(self.mlp(inner))

    def __init__(self) -> None:
        super().__init__()
        for number, layer in enumerate(self.layers):
            layer.fails = number == 1

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            try:
                x = layer(x)
            except ValueError:
                x = x * 0.5
        return x


@way("blocks left out at random")
class LeftOut(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if torch.rand(()) < 0.6:
                x = layer(x)
        return x


@way("blocks on threads of their own")
class Threads(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        def run(layer: nn.Module) -> Any:
            with torch.enable_grad():
                return layer(x)

        # One after the other, so that sums have an order, yet not on the thread that called forward.
        with ThreadPoolExecutor(1) as pool:
            return sum(pool.map(run, self.layers), x)


@way("a weight kept from the step before")
class KeepsWeight(Stack):
    """What a running mean of weights does: it reads in one step what it saw in another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH, WIDTH))

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.lerp_(self.layers[2].mlp.weight, 0.5)
        return functional.linear(super().blocks(x), self.mean)
