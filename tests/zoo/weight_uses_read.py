"""Parts of a block that others call, and weights that others read."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from small_models import Batch
from stacks import LENGTH, WIDTH, Block, Stack, way
from torch import nn
from torch.nn import functional


@way("a parent calls the parts of a block")
class CallsParts(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer.attn(layer.norm(x))
            x = x + layer.mlp(x)
        return x


@way("a parent calls the parts of all blocks in turn")
class CallsPartsInTurn(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer.attn(x))
        for layer in self.layers:
            x = x + torch.tanh(layer.mlp(x))
        return x


@way("a parent calls a method of a block")
class CallsMethod(Stack):
    class block(Block):
        def attend(self, x: torch.Tensor) -> torch.Tensor:
            return x + functional.linear(x, self.attn.weight, self.attn.bias)

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer.attend(x)) + layer(x)
        return x


@way("a module reads its child's weight")
class ReadsChild(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(functional.linear(x, self.attn.weight, self.mlp.bias)) + self.mlp(x)


@way("a module applies its child's convolution by hand")
class ConvolvesByHand(Stack):
    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
            self.a = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = functional.conv1d(x.transpose(1, 2), self.conv.weight, self.conv.bias, padding=2, groups=WIDTH)
            return x + y[..., :LENGTH].transpose(1, 2) * -torch.exp(self.a)


@way("a module looks at its child's shape and dtype")
class LooksAtShape(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = self.attn.weight.shape[0]
            assert x.shape[-1] <= self.mlp.weight.size(1), "the weight is not there"
            scaled = x.to(self.mlp.weight.dtype) / wide
            return super().forward(scaled * self.mlp.bias.numel())


@way("a module reads its sibling's parameter")
class ReadsSibling(Stack):
    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["sibling"] = [self.attn]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(functional.linear(self.mlp(x), self.__dict__["sibling"][0].weight))


@way("a block reads another block's parameter")
class ReadsOtherBlock(Stack):
    def __init__(self) -> None:
        super().__init__()
        for one, other in itertools.pairwise(self.layers):
            one.__dict__["other"] = [other]

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            for other in layer.__dict__.get("other", []):
                x = x + torch.tanh(functional.linear(x, other.mlp.weight, layer.mlp.bias))
        return x


@way("the root reads weights of blocks")
class Penalty(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x).square().mean()
        return out + 1e-2 * sum(layer.mlp.weight.square().sum() for layer in self.layers)


def penalty(model: nn.Module, out: torch.Tensor) -> torch.Tensor:
    """What a script that knows nothing of shards adds to its loss."""
    return out.square().mean() + 1e-2 * sum(param.square().sum() for param in model.parameters())


@way("a penalty on all weights outside of forward", loss=penalty)
class PenaltyOutside(Stack):
    pass


@way("a loss that uses a block again outside of forward", loss=lambda model, out: out.mean() + again(model, out))
class AgainOutside(Stack):
    pass


def again(model: nn.Module, out: torch.Tensor) -> torch.Tensor:
    wide = functional.pad(out, (0, WIDTH - out.shape[-1]))
    return model.layers[1](wide).square().mean() + functional.linear(wide, model.layers[2].mlp.weight).mean()


@way(
    "hooks registered after the engine is there",
    call=lambda model, b: hooked(model, b),
    loss=lambda model, kept: kept[0],
)
class HookedLater(Stack):
    pass


def hooked(model: Any, batch: Batch) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    module = getattr(model, "module", model)
    hooks = [
        layer.attn.register_forward_hook(lambda m, args, out: kept.append(out + m.weight.mean()))
        for layer in module.layers
    ]
    out = model(**batch)
    for hook in hooks:
        hook.remove()
    return [out.square().mean() + sum(each.square().mean() for each in kept)]


@way("blocks in a ModuleDict, a Sequential and a list of lists")
class OtherContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ModuleDict({"a": Block(), "b": Block()})
        self.row = nn.Sequential(Block(), nn.Sequential(Block(), Block()))
        self.grid = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.named["b"](self.named["a"](x)) + self.named["a"].mlp(x)
        x = self.row(x) + functional.linear(x, self.row[1][0].mlp.weight)
        for row in self.grid:
            for block in row:
                x = block(x) + torch.tanh(block.attn(x))
        return x


class Level(nn.Module):
    """A module with a parameter of its own, which uses its child's, too."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.below = Level(depth - 1) if depth else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x)) * self.scale
        if self.below is None:
            return x + y
        return self.below(y) * self.below.scale + x * self.scale


@way("owners nested five deep")
class Nested(Stack):
    class block(Level):
        def __init__(self) -> None:
            super().__init__(4)


@way("parameters in lists and dicts, read by their parent")
class InLists(Stack):
    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(torch.randn(WIDTH, WIDTH) * 0.1 for _ in range(3))
            self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(WIDTH))})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = x + torch.tanh(x @ part + self.named["bias"])
            return x


@way("weights that any shape broadcasts with, used around children")
class Broadcasts(Stack):
    """An empty tensor broadcasts with a trailing 1: a gradient of such a weight would be summed over nothing."""

    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((LENGTH, 1), 2.3))
            self.gain = nn.Parameter(torch.tensor([0.7]))
            self.shift = nn.Parameter(torch.tensor(0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = torch.clamp(self.scale, max=4.0).exp()
            inner = self.attn(self.norm(x)) * scale
            return x + torch.tanh(self.mlp(inner * self.gain)) * self.gain + torch.sigmoid(self.shift) * self.shift


@way("a clamped weight with a trailing 1, used around children")
class Clamped(Stack):
    """The gradient of clamp looks at the weight; what is broadcast with nothing sums to zeros of the right shape."""

    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((LENGTH, 1), 0.3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = torch.clamp(self.scale, max=1.0).exp()
            return x + torch.tanh(self.mlp(self.attn(self.norm(x)) * scale))
