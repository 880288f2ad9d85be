"""The model that is modelled, Llama of 7 B parameters at micro-batch 8 x 2048, and a small one of the same proportions.

Every matrix of the small one has 1/4096 of the elements. With units and blocks of 1/4096 of the bytes, an engine does
the same with it, in the same order and as many copies.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH, LAYERS = 8, 2048, 32
SHRINK = 64
TOKENS = BATCH * LENGTH
WIDTH, VOCABULARY = 4096, 32000
CHECKPOINT = 2 * TOKENS * WIDTH
"""Bytes of what a layer takes and gives."""


def build(shrink: int = 1, layers: int = LAYERS) -> LlamaForCausalLM:
    """Llama 7 B, with all dimensions divided by `shrink`, and all layers checkpointed."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH // shrink,
            intermediate_size=11008 // shrink,
            num_hidden_layers=layers,
            num_attention_heads=32 if shrink == 1 else 2,
            vocab_size=VOCABULARY // shrink,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    with warnings.catch_warnings():
        # The name that has replaced this one is in newer releases alone.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@dataclass(frozen=True)
class Costs:
    """FLOP of the large model's parts: a product with a matrix of n elements is 2 n a token, causal attention of a
    layer 2 * LENGTH * WIDTH a token, and backward takes twice that, for inputs and weights (arXiv:2001.08361,
    appendix B, with the half of attention that a causal mask leaves). Attention counts with the product that follows
    it."""

    shapes: dict[str, tuple[int, ...]]

    def forward(self, name: str) -> float:
        """Of what is computed with the parameter of this name."""
        shape = self.shapes[name]
        if len(shape) < 2 or "embed" in name:
            return 0.0
        attention = 2.0 * LENGTH * WIDTH * TOKENS if "o_proj" in name else 0.0
        return 2.0 * shape[0] * shape[1] * TOKENS + attention

    def backward(self, name: str) -> float:
        """For the gradient of the parameter and of what came into it."""
        return 2 * self.forward(name)

    def numel(self, name: str) -> int:
        """Elements of the parameter."""
        return torch.Size(self.shapes[name]).numel()

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(map(self.numel, self.shapes))


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Of the large model's parameters, in the order of forward."""
    with torch.device("meta"):
        return {name: tuple(param.shape) for name, param in build(layers=layers).named_parameters()}


def activation_bytes(layers: int = LAYERS, *, kept: bool = False) -> int:
    """What a step takes of the device at the most beside weights and gradients, every layer checkpointed.

    Checkpoints (`kept` in host memory, two remain), and the larger of one layer's activations, 34 bytes a token and
    column (arXiv:2205.05198, section 4.1, attention recomputed by its own kernel), and logits: in bf16 and in fp32,
    with the gradient of each.
    """
    checkpoints = min(layers, 2) if kept else layers
    return checkpoints * CHECKPOINT + max(34 * TOKENS * WIDTH, 12 * TOKENS * VOCABULARY)
