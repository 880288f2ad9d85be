"""The language model that `zeroxide bench` trains: a decoder of torch's own layers, so that nothing else is needed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["VOCABULARY", "Decoder"]

VOCABULARY = 16_384


class Decoder(nn.Module):
    """Tokens to the loss of the next one: embeddings, `layers` blocks of `width`, and a head tied to the embedding."""

    def __init__(self, layers: int, width: int, columns: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(columns, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, max(1, width // 64), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: int64 of shape (rows, columns). Returns the mean loss, of shape ()."""
        columns = tokens.shape[1]
        x = self.tokens(tokens) + self.places(torch.arange(columns, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(columns, device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), tokens[:, 1:].reshape(-1))
