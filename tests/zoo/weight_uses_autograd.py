"""Autograd that goes its own way: functions that recompute, checkpoints, outputs whose value nobody uses."""

from __future__ import annotations

from typing import Any

import torch
from stacks import WIDTH, Block, Stack, way
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class ReverseTwo(torch.autograd.Function):
    """A reversible block keeps no input: backward computes it from the output, and runs both halves again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, f: nn.Module, g: nn.Module, *weights: torch.Tensor) -> torch.Tensor:
        ctx.f, ctx.g, ctx.weights = f, g, weights
        with torch.no_grad():
            one, two = x.chunk(2, -1)
            first = one + f(two)
            out = torch.cat([first, two + g(first)], -1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (out,) = ctx.saved_tensors
        first, second = out.chunk(2, -1)
        with torch.no_grad():
            two = second - ctx.g(first)
            one = first - ctx.f(two)
        with torch.enable_grad():
            x = torch.cat([one, two], -1).requires_grad_()
            a, b = x.chunk(2, -1)
            again = a + ctx.f(b)
            again = torch.cat([again, b + ctx.g(again)], -1)
        grads = torch.autograd.grad(again, [x, *ctx.weights], grad)
        return grads[0], None, None, *grads[1:]


class ReverseInPlace(ReverseTwo):
    """As above, but gradients of weights accumulate by a backward inside of backward, as Reformer's do."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (out,) = ctx.saved_tensors
        first, second = out.chunk(2, -1)
        with torch.no_grad():
            two = second - ctx.g(first)
            one = first - ctx.f(two)
        with torch.enable_grad():
            x = torch.cat([one, two], -1).requires_grad_()
            a, b = x.chunk(2, -1)
            again = a + ctx.f(b)
            again = torch.cat([again, b + ctx.g(again)], -1)
            again.backward(grad)
        return x.grad, None, None, *(None for _ in ctx.weights)


def half(width: int = WIDTH // 2) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def reversible(function: type[ReverseTwo], pass_weights: bool) -> type[Stack]:
    class Reversible(Stack):
        class block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.f, self.g = half(), half()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                weights = [*self.f.parameters(), *self.g.parameters()] if pass_weights else []
                return function.apply(x, self.f, self.g, *weights)

    return Reversible


way("reversible blocks")(reversible(ReverseTwo, True))
way("reversible blocks with backward inside backward")(reversible(ReverseInPlace, False))


class Multiply(torch.autograd.Function):
    """x W with a weight that is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


class MultiplyKept(Multiply):
    """As above, with the weight as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = ctx.saved_tensors
        return grad @ ctx.weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


def own_function(function: type[Multiply]) -> type[Stack]:
    class OwnFunction(Stack):
        class block(Block):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + torch.tanh(function.apply(self.attn(x), self.mlp.weight)) + self.mlp.bias

    return OwnFunction


way("a function of its own that saves a weight")(own_function(Multiply))
way("a function of its own that keeps a weight as attribute")(own_function(MultiplyKept))


class OnlyBackward(torch.autograd.Function):
    """Hands `x` on; its gradient goes to `side`, too, whose value nobody looks at."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, 0.5 * grad


@way("an output that only a later module's backward uses")
class LaterBackward(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.side = self.attn(x)
            return x + torch.tanh(self.mlp(x))

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        for layer in self.layers:
            x = OnlyBackward.apply(x, layer.side)
        return x


def checkpointed(reentrant: bool, part: bool) -> type[Stack]:
    class Checkpointed(Stack):
        class block(Block):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if not part:
                    return super().forward(x)
                return x + torch.tanh(checkpoint(self.inner, x, use_reentrant=reentrant))

            def inner(self, x: torch.Tensor) -> torch.Tensor:
                return self.mlp(torch.tanh(functional.linear(self.norm(x), self.attn.weight)))

        def blocks(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) if part else checkpoint(layer, x, use_reentrant=reentrant)
            return x

    return Checkpointed


for _reentrant in (True, False):
    _kind = "reentrant" if _reentrant else "without reentry"
    way(f"checkpointed blocks, {_kind}")(checkpointed(_reentrant, False))
    way(f"checkpointed parts of blocks, {_kind}")(checkpointed(_reentrant, True))


@way("checkpoint over several blocks")
class CheckpointedPairs(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for start in (0, 2):
            x = checkpoint(lambda y, start=start: self.layers[start + 1](self.layers[start](y)), x, use_reentrant=False)
        return x


@way("checkpoint_sequential")
class CheckpointedSequence(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_sequential(list(self.layers), 2, x, use_reentrant=False)


@way("checkpoints inside checkpoints")
class CheckpointsInside(checkpointed(False, True)):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@way("a checkpointed block whose parts a parent calls")
class CheckpointedParts(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(checkpoint(layer.attn, x, use_reentrant=False))
            x = x + torch.tanh(checkpoint(layer.mlp, x, use_reentrant=True))
        return x
