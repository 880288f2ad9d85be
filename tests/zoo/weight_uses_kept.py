"""Losses on something inside a block that the block does not return."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from stacks import Block, Stack, stack_of, way
from torch.utils.checkpoint import checkpoint


class Remembers(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aux = torch.tanh(self.attn(x)).square().mean()
        return x + self.mlp(x)


@way("auxiliary losses kept on modules")
class Auxiliary(stack_of(Remembers)):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x).square().mean()
        return out + sum(layer.aux for layer in self.layers)


@way("only one block's auxiliary loss")
class OneAuxiliary(stack_of(Remembers)):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        return self.layers[1].aux


@way("auxiliary losses read outside of forward", loss=lambda model, out: sum(layer.aux for layer in model.layers))
class AuxiliaryOutside(stack_of(Remembers)):
    pass


@way("an auxiliary loss inside a checkpointed block")
class CheckpointedAuxiliary(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), self.attn(x).square().mean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for layer in self.layers:
            x, aux = checkpoint(layer, x, use_reentrant=False)
            total = total + aux
        return x.square().mean() + total


def kept_by_hooks(inner: str, alone: bool) -> type[Stack]:
    class Kept(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[torch.Tensor] = []
            for layer in self.layers:
                layer.get_submodule(inner).register_forward_hook(lambda m, args, out: self.kept.append(out))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.clear()
            out = super().forward(x)
            features = sum(((each - 0.1) ** 2).mean() for each in self.kept)
            return features if alone else features + out.square().mean()

    return Kept


way("features kept by hooks inside blocks")(kept_by_hooks("attn", False))
way("features kept by hooks inside blocks, alone")(kept_by_hooks("attn", True))
way("features kept by hooks on the last module of blocks")(kept_by_hooks("mlp", False))


class Cache:
    """What models keep keys and values in: an object that is neither a container nor a dataclass."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


@way("a cache object that blocks fill")
class FillsCache(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
            cache.keys.append(self.attn(x))
            earlier = sum(cache.keys) / len(cache.keys)
            return x + torch.tanh(self.mlp(earlier))

    def forward(self, x: torch.Tensor) -> Any:
        cache = Cache()
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, cache)
        return self.head(x).mean() + sum(key.square().mean() for key in cache.keys)


class Plain:
    def __init__(self, **values: Any) -> None:
        self.__dict__ |= values


def returns(make: Callable[..., Any]) -> type[Stack]:
    class Returns(Stack):
        class block(Block):
            def forward(self, x: torch.Tensor) -> Any:
                inner = self.attn(self.norm(x))
                return make(hidden=x + self.mlp(inner), inner=inner)

        def forward(self, x: torch.Tensor) -> Any:
            total = torch.zeros(())
            for layer in self.layers:
                out = layer(x)
                x, total = out.hidden, total + out.inner.square().mean()
            return total + self.head(x).mean()

    return Returns


way("blocks return plain objects")(returns(Plain))
way("blocks return namespaces")(returns(SimpleNamespace))


@way("a block returns a function of its weights")
class Closures(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return lambda later: later + torch.tanh(self.mlp(x))

    def forward(self, x: torch.Tensor) -> Any:
        later = [layer(x) for layer in self.layers]
        for each in later:
            x = each(x)
        return self.head(x)


@way("a block yields its parts")
class Yields(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> Any:
            yield self.attn(x)
            yield self.mlp(x)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = x + sum(torch.tanh(part) for part in layer(x))
        return self.head(x)
