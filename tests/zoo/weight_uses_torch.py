"""Modules of torch that read their children's weights, and weights that are tied, replaced or computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stacks import LENGTH, WIDTH, WORDS, Block, Stack, both, evaluated_first, way, words
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrizations


@way("nn.TransformerEncoder")
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


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
