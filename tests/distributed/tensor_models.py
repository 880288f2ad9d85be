"""Tiny Hugging Face models for tensor parallelism, batches, and plain PyTorch's training of them in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 61
ROWS, LENGTH = 2, 12
STEPS = 20
CLIP = 0.5
ADAM = {"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-4}
"""An epsilon of the size of gradients: otherwise Adam makes a whole step of what rounding leaves of a zero."""


def build(family: str, dropout: float = 0.0) -> nn.Module:
    """The same weights each time."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        return GPT2LMHeadModel(GPT2Config(**tokens, n_embd=32, n_layer=2, n_head=4, **drops))
    if family in ("llama", "uneven"):
        # Grouped queries; with "uneven" three heads of keys and values, and features that two ranks cannot halve.
        heads, groups, width = (6, 3, 49) if family == "uneven" else (4, 2, 64)
        return LlamaForCausalLM(
            LlamaConfig(
                **tokens,
                hidden_size=8 * heads,
                head_dim=8,
                num_hidden_layers=2,
                num_attention_heads=heads,
                num_key_value_heads=groups,
                intermediate_size=width,
                attention_bias=True,
                attention_dropout=dropout,
                tie_word_embeddings=family == "uneven",
            )
        )
    if family == "qwen3":
        # Norms within what is cut: each rank has a part of their gradients.
        return Qwen3ForCausalLM(
            Qwen3Config(
                **tokens,
                hidden_size=32,
                head_dim=8,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
            )
        )
    assert family == "t5"
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=dropout, decoder_start_token_id=0))


def batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    # As many labels in every batch: the mean over batches is the mean over their tokens.
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def train_plain(family: str, replicas: int, dtype: torch.dtype) -> dict[str, Any]:
    """Losses and norms of each step, and the weights after the last; `replicas` batches a step."""
    model = build(family).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for replica in range(replicas):
            loss = model(**batch(step * replicas + replica)).loss
            (loss / replicas).backward()
            total += loss.item() / replicas
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: each.detach() for name, each in model.named_parameters()},
    }
