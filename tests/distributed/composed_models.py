"""The models and samples of tests of compositions, and plain PyTorch's training of them in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["IGNORED", "SAMPLES", "batch", "build", "train_plain"]

VOCABULARY, SAMPLES, TOKENS, IGNORED = 64, 2, 16, -100


def build(kind: str, *, plain_experts: bool = False) -> nn.Module:
    """A model on which all axes divide; the same weights in every process.

    plain_experts: whether experts are computed one after the other, which alone takes fp64.
    """
    # Here, since transformers imports accelerate, which looks for deepspeed once and for all.
    import transformers

    torch.manual_seed(1)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=4, n_head=4, attn_pdrop=0, resid_pdrop=0,
            embd_pdrop=0, attn_implementation="sdpa",
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).train()
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    if kind == "mixtral":
        config = transformers.MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
        if plain_experts:
            config._experts_implementation = "eager"
        return transformers.MixtralForCausalLM(config).train()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).train()


def batch(kind: str, step: int, number: int) -> dict[str, torch.Tensor]:
    """Micro-batch `number` of a step: as many labels in each, so that a mean over them is one over tokens."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, :4] = IGNORED
    positions = torch.arange(TOKENS).expand(SAMPLES, -1).clone()
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def train_plain(kind: str, steps: int, numbers: int, clip: float, lr: float, dtype: torch.dtype) -> dict[str, Any]:
    """Losses, norms and the weights at the end."""
    model = build(kind, plain_experts=True).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-5, weight_decay=0.01, foreach=False)
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for number in range(numbers):
            loss = model(**batch(kind, step, number), use_cache=False).loss
            (loss / numbers).backward()
            total += loss.item() / numbers
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses, "norms": norms, "weights": {n: p.detach().double() for n, p in model.named_parameters()}}
