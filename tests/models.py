"""Tiny models, one for every way in which a model can use its parameters, each with batches and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOCABULARY = 61
WIDTH = 48
LENGTH = 12
ROWS = 2

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How to make one kind of model, and what to feed it. `dtypes` are those it can be trained in."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]
    dtypes: tuple[str, ...] = ("bf16", "fp32")


def tokens(generator: torch.Generator, rows: int = ROWS) -> Batch:
    return {"input_ids": torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)}


def labelled(generator: torch.Generator, rows: int = ROWS) -> Batch:
    ids = tokens(generator, rows)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def loss_of(output: Any) -> torch.Tensor:
    """The loss wherever a family's output has it."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict) and "nested" in output:
        return output["nested"][1]["losses"][0]
    return output.loss


class Block(nn.Module):
    """A pre-norm feed-forward block over a causal mean of the past, cheap and order dependent."""

    def __init__(self, width: int = WIDTH, relu_in_place: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.act = nn.ReLU(inplace=True) if relu_in_place else nn.GELU()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        past = torch.cumsum(self.mix(self.norm(hidden)), 1) / torch.arange(
            1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device
        ).view(1, -1, 1)
        return hidden + self.down(self.act(self.up(past)))


class Gpt(nn.Module):
    """Embedding, blocks, head tied to the embedding. `checkpointing` is None or the value of `use_reentrant`."""

    def __init__(self, layers: int = 4, checkpointing: bool | None = None, relu_in_place: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.h = nn.ModuleList(Block(relu_in_place=relu_in_place) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        self.checkpointing = checkpointing

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(input_ids)
        for block in self.h:
            if self.checkpointing is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.checkpointing)
        return self.norm(hidden)

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(input_ids))

    def forward(self, input_ids: torch.Tensor) -> Any:
        return next_token_loss(self.logits(input_ids), input_ids)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


class InPlaceOps(Gpt):
    """In-place operations on the outputs of blocks and inside them."""

    def __init__(self) -> None:
        super().__init__(3, relu_in_place=True)

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(input_ids)
        for block in self.h:
            hidden = block(hidden)
            hidden.mul_(0.5).add_(1e-3)
        return self.norm(hidden)


class AddsToInput(Block):
    """A block that changes its input and returns that same tensor."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.add_(super().forward(hidden.clone()))


class InPlaceBlocks(Gpt):
    def __init__(self) -> None:
        super().__init__(0)
        self.h = nn.ModuleList(AddsToInput() for _ in range(4))


class Adapted(Gpt):
    """Everything frozen but low-rank adapters on every block, and one block frozen throughout."""

    def __init__(self) -> None:
        super().__init__(4)
        self.requires_grad_(False)
        for number, block in enumerate(self.h):
            if number != 1:
                block.down = LowRank(block.down)


class LowRank(nn.Module):
    """A frozen linear layer and a trainable low-rank one beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.05)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) * 0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class PartlyFrozen(Gpt):
    """A frozen embedding without a tied head, a frozen first block and a frozen bias in each other one."""

    def __init__(self) -> None:
        super().__init__(4)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.wte.requires_grad_(False)
        self.h[0].requires_grad_(False)
        for block in self.h[1:]:
            block.up.bias.requires_grad_(False)


class UsedTwice(Gpt):
    """The same block at two depths, one more parameter used by two blocks, and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__(3)
        self.h[2].up.weight = self.h[0].up.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(input_ids)
        for number in (0, 1, 2, 1, 0):
            hidden = self.h[number](hidden) * self.scale
        return self.norm(hidden)


class SometimesUnused(Gpt):
    """Every block holds two experts; which one runs depends on the batch, so the other has no gradient."""

    def __init__(self) -> None:
        super().__init__(0)
        self.h = nn.ModuleList(Experts() for _ in range(6))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Block(), Block()])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.experts[int(hidden.detach().float().sum() > 0)](hidden)


class NestedOutput(Gpt):
    """A loss deep inside containers, beside outputs that the loss does not depend on."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        logits = self.logits(input_ids)
        loss = next_token_loss(logits, input_ids)
        return {"nested": ("text", {"losses": [loss, logits.detach()]}), "logits": logits, "none": None}


class BlockLists(nn.Module):
    """Blocks that are lists of modules themselves: nothing ever calls the forward of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)])
            for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(input_ids)
        for norm, up, down in self.layers:
            hidden = hidden + down(functional.gelu(up(norm(hidden))))
        return next_token_loss(self.head(hidden), input_ids)


class ConvNet(nn.Module):
    """Convolutions with batch norm, whose statistics are buffers that forward changes, and channels-last weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in ((3, 8), (8, 16), (16, 16))
        )
        self.head = nn.Linear(16, 5)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            images = stage(images)
        return functional.cross_entropy(self.head(images.mean((2, 3))), classes)


def images(generator: torch.Generator, rows: int = 4) -> Batch:
    return {
        "images": torch.randn(rows, 3, 8, 8, generator=generator),
        "classes": torch.randint(0, 5, (rows,), generator=generator),
    }


class Recurrent(nn.Module):
    """A module that keeps its own list of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return next_token_loss(self.head(self.lstm(self.wte(input_ids))[0]), input_ids)


def hf_gpt2(checkpointing: bool | None = None) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    return model


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=0,
            eos_token_id=1, pad_token_id=None,
        )
    )  # fmt: skip


def hf_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "gpt": Family(lambda: Gpt(), tokens),
    "gpt-reentrant": Family(lambda: Gpt(checkpointing=True), tokens),
    "gpt-nonreentrant": Family(lambda: Gpt(checkpointing=False), tokens),
    "in-place": Family(InPlaceOps, tokens),
    "in-place-blocks": Family(InPlaceBlocks, tokens),
    "adapters": Family(Adapted, tokens),
    "partly-frozen": Family(PartlyFrozen, tokens),
    "used-twice": Family(UsedTwice, tokens),
    "sometimes-unused": Family(SometimesUnused, tokens),
    "nested-output": Family(NestedOutput, tokens),
    "block-lists": Family(BlockLists, tokens),
    "recurrent": Family(Recurrent, tokens),
    "conv": Family(ConvNet, images, ("fp32",)),
    "hf-gpt2": Family(hf_gpt2, labelled),
    "hf-gpt2-reentrant": Family(lambda: hf_gpt2(True), labelled),
    "hf-gpt2-nonreentrant": Family(lambda: hf_gpt2(False), labelled),
    "hf-llama": Family(hf_llama, labelled),
    "hf-t5": Family(hf_t5, labelled),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The family's model, the same one for the same seed."""
    torch.manual_seed(seed)
    return FAMILIES[name].build()


def batches(name: str, count: int, rows: int = ROWS, seed: int = 1) -> list[Batch]:
    """The same batches for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [FAMILIES[name].batch(generator, rows) for _ in range(count)]
