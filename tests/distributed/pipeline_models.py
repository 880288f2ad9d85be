"""Models, micro-batches and plain training for tests of pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zeroxide.parallel.pipe import LayerSpec, TiedLayerSpec

VOCABULARY, WIDTH, SAMPLES = 64, 32, 2


class Block(nn.Module):
    """Takes and gives a dict of a tensor and what goes with it, as layers may."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, given: dict[str, Any]) -> dict[str, Any]:
        hidden, seen = given["hidden"], given["more"]
        return {
            "hidden": hidden + self.narrow(functional.gelu(self.wide(self.norm(hidden)))),
            "more": (seen[0] + 1, [seen[1][0], hidden.mean()]),
        }


def begin(hidden: torch.Tensor) -> dict[str, Any]:
    return {"hidden": hidden, "more": (0, [None, hidden.mean()])}


class End(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, given: dict[str, Any]) -> torch.Tensor:
        assert given["more"][0] == BLOCKS, "every block has run, once"
        return self.norm(given["hidden"]) + given["more"][1][1]


BLOCKS = 4


class Embedding(nn.Module):
    """Words and positions, as Megatron's: heads use the words alone, by a property that `tied_weight_attr` names."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(32, WIDTH)

    @property
    def words_weight(self) -> torch.Tensor:
        return self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.positions(torch.arange(ids.shape[1]))


def project(embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
    return functional.linear(hidden, embedding.words.weight)


def layers(tied: bool = True) -> list[Any]:
    last = (
        TiedLayerSpec("embedding", Embedding, forward_fn=project, tied_weight_attr="words_weight")
        if tied
        else LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=False)
    )
    first = TiedLayerSpec("embedding", Embedding, tied_weight_attr="words_weight")
    return [first, begin, *(LayerSpec(Block) for _ in range(BLOCKS)), LayerSpec(End), last]


class Whole(nn.Module):
    """The same layers as one module, each with the seed of its place."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.specs = layers(tied)
        self.tied_modules = nn.ModuleDict()
        for at, spec in enumerate(self.specs):
            torch.manual_seed(1234 + at)
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = spec.typename(*spec.module_args)
            elif isinstance(spec, LayerSpec):
                self.add_module(str(at), spec.typename(*spec.module_args, **spec.module_kwargs))

    def forward(self, value: Any) -> Any:
        for at, spec in enumerate(self.specs):
            if isinstance(spec, TiedLayerSpec):
                module = self.tied_modules[spec.key]
                value = module(value) if spec.forward_fn is None else spec.forward_fn(module, value)
            elif isinstance(spec, LayerSpec):
                value = self._modules[str(at)](value)
            else:
                value = spec(value)
        return value


def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def causal(kind: str) -> nn.Module:
    """A small model of Hugging Face's, always with the same weights."""
    torch.manual_seed(0)
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, **none)
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def whole_model(kind: str) -> nn.Module:
    return Whole(kind == "tied layers") if kind.endswith("layers") else causal(kind)


def batch(kind: str, step: int, number: int) -> Any:
    """A micro-batch: of another length each time, and for causal models with padding."""
    made = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(0, VOCABULARY, (SAMPLES, 6 + number), generator=made)
    if kind.endswith("layers"):
        return ids, ids.roll(-1, 1)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_of(model: nn.Module, kind: str, given: Any) -> torch.Tensor:
    if kind.endswith("layers"):
        return loss_fn(model(given[0]), given[1])
    loss: torch.Tensor = model(**given).loss
    return loss


def train_plain(kind: str, steps: int, numbers: int, dtype: torch.dtype, clip: float, lr: float) -> dict[str, Any]:
    """Plain PyTorch in one process: losses, norms, weights, and the loss of an evaluation."""
    model = whole_model(kind).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, foreach=False)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for number in range(numbers):
            loss = loss_of(model, kind, batch(kind, step, number))
            (loss / numbers).backward()
            total += loss.item() / numbers
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(total)
    with torch.no_grad():
        evaluated = sum(loss_of(model, kind, batch(kind, steps, number)).item() for number in range(numbers)) / numbers
    weights = {name: param.detach().double() for name, param in model.named_parameters(remove_duplicate=False)}
    return {"losses": losses, "norms": norms, "evaluated": evaluated, "weights": weights}
