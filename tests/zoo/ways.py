"""Small models that use their weights in unusual ways, one way each: whoever uses a weight, it is there.

Every model takes `x` of shape (rows, length, WIDTH) and has blocks in a module list, as what is cut into units has.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from small_models import Batch, Small
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

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


# Losses on something inside a block that the block does not return.


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


# Parts of a block that others call or read.


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


# Modules of torch that read their children's weights.


@way("nn.TransformerEncoder")
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def evaluated_first(model: Any, batch: Batch) -> list[torch.Tensor]:
    """A pass for evaluation, then one for training."""
    model.eval()
    with torch.no_grad():
        first = model(**batch)
    model.train()
    return [first, model(**batch)]


def both(model: nn.Module, outputs: list[torch.Tensor]) -> torch.Tensor:
    return outputs[0].mean() + outputs[1].square().mean()


way("nn.TransformerEncoder, evaluated between steps", call=evaluated_first, loss=both)(Encoder)


@way("nn.TransformerEncoderLayer in a list", call=evaluated_first, loss=both)
class EncoderLayers(Stack):
    class block(nn.TransformerEncoderLayer):
        def __init__(self) -> None:
            super().__init__(WIDTH, 2, 32, batch_first=True, norm_first=True)


@way("nn.Transformer")
class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(WIDTH, 2, 2, 2, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x, x.flip(1))


@way("nn.MultiheadAttention", call=evaluated_first, loss=both)
class Attention(Stack):
    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True, add_bias_kv=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.attn(x, x, x, need_weights=False)[0]


def recurrent(make: Callable[[], nn.Module]) -> type[Stack]:
    class Recurrent(Stack):
        class block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cell = make()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.cell(x)[0]

    return Recurrent


way("nn.LSTM")(recurrent(lambda: nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)))
way("nn.LSTM with projections, both ways")(
    recurrent(lambda: nn.LSTM(WIDTH, WIDTH, 1, batch_first=True, bidirectional=True, proj_size=WIDTH // 2))
)
way("nn.GRU")(recurrent(lambda: nn.GRU(WIDTH, WIDTH, 2, batch_first=True)))
way("nn.RNN")(recurrent(lambda: nn.RNN(WIDTH, WIDTH, batch_first=True)))


@way("nn.LSTMCell stepped by hand")
class Cells(Stack):
    class block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = None
            outs = []
            for step in x.unbind(1):
                state = self.cell(step, state)
                outs.append(state[0])
            return torch.stack(outs, 1)


# Weights that are tied, replaced, computed.


@way("a head tied by hand", words)
class TiedByHand(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(self.blocks(self.emb(ids)), self.emb.weight)
        return functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


@way("rows of an embedding's weight by index", words)
class RowsByIndex(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, WIDTH)

    def forward(self, ids: torch.Tensor) -> Any:
        return super().forward(self.emb.weight[ids] + functional.embedding(ids.flip(1), self.emb.weight))


@way("functional_call of a child")
class Functional(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = functional_call(layer, dict(layer.named_parameters()), (x,))
        return x


@way("functional_call with changed weights")
class FunctionalChanged(Stack):
    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            changed = {name: param * 1.1 + 0.01 for name, param in layer.named_parameters()}
            x = functional_call(layer, changed, (x,))
        return x


def parametrised(change: Callable[[nn.Linear], nn.Module], *names: str) -> type[Stack]:
    class Parametrised(Stack):
        class block(Block):
            def __init__(self) -> None:
                super().__init__()
                for name in names:
                    change(getattr(self, name))

    return Parametrised


way("weight_norm")(parametrised(parametrizations.weight_norm, "attn", "mlp"))
way("spectral_norm")(parametrised(parametrizations.spectral_norm, "attn"))
way("orthogonal")(parametrised(lambda linear: parametrizations.orthogonal(linear, use_trivialization=False), "attn"))
way("weight_norm by hooks")(parametrised(nn.utils.weight_norm, "attn", "mlp"))


@way("a parametrised weight read by a parent")
class ParametrisedRead(Stack):
    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            parametrizations.weight_norm(self.attn)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(functional.linear(x, self.attn.weight, self.attn.bias))


@way("blocks return views of their weights")
class ReturnsViews(Stack):
    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(2 * LENGTH, WIDTH))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), self.position[: x.shape[1]]

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        views = []
        for layer in self.layers:
            x, view = layer(x)
            views.append(view)
        return x + sum(views)


@way("blocks return their weights")
class ReturnsWeights(Stack):
    class block(Block):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), self.mlp.weight

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        weights = []
        for layer in self.layers:
            x, weight = layer(x)
            weights.append(weight)
        return torch.tanh(x @ sum(weights))


@way("hooks keep detached weights")
class KeepsDetached(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        for layer in self.layers:
            layer.mlp.register_forward_hook(lambda m, args, out: self.seen.append(m.weight.detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.clear()
        out = super().forward(x).square().mean()
        return out * (1 + sum(each.square().mean() for each in self.seen))


# Autograd that goes its own way.


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


# Hooks of the user's own, and calls that come more than once.


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
