"""GPT-2 as both sides train it: sizes, weights by name, and the batch.

Weights depend on the parameter's name and the seed only, so two engines that build the model in different orders, or
a piece at a time, begin from the same bits and their losses can be compared.
"""

from __future__ import annotations

import math
import zlib

import torch
from transformers import GPT2Config

SIZES = {
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 128, "vocab_size": 1024},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "355m": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "774m": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "1b": {"n_layer": 36, "n_head": 24, "n_embd": 1536},
}

INITIALIZER_RANGE = 0.02
SEED = 1234


def model_config(size: str) -> GPT2Config:
    """The configuration of `size`: dropout 0, so that a step is a function of weights and batch alone."""
    return GPT2Config(**SIZES[size], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)


@torch.no_grad()
def fill_parameter(name: str, tensor: torch.Tensor, n_layer: int) -> None:
    """Put GPT-2's initial value of the parameter `name` into `tensor` (float32, in place).

    Normal with deviation 0.02, residual projections divided by sqrt(2 * layers), norms one, biases zero (Radford et
    al. 2019, section 2.3).
    """
    if name.endswith(".bias"):
        tensor.zero_()
    elif ".ln_" in name or name.startswith("ln_"):
        tensor.fill_(1.0)
    else:
        generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
        deviation = INITIALIZER_RANGE
        if name.endswith("c_proj.weight"):
            deviation /= math.sqrt(2 * n_layer)
        tensor.normal_(0.0, deviation, generator=generator)


def batch(size: str, rows: int, columns: int, step: int) -> dict[str, torch.Tensor]:
    """The `rows` x `columns` token ids (int64) of `step`, cycling over four batches so that the loss falls."""
    generator = torch.Generator().manual_seed(SEED + step % 4)
    vocabulary = SIZES[size].get("vocab_size", 50257)
    tokens = torch.randint(0, vocabulary, (rows, columns), generator=generator)
    return {"input_ids": tokens, "labels": tokens}
