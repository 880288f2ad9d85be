"""Philox4x32-10 in torch: the random numbers of `cuda/include/zx/philox.cuh`.

Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch

__all__ = ["philox", "random_words"]

WORD = 0xFFFFFFFF


def philox(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Four int64 tensors of 32-bit words, for four of the same that are the counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two words may pass 2^63: its bits are right all the same, and the shift's copies of the sign go.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((second >> 32) & WORD) ^ c1 ^ k0,
            second & WORD,
            ((first >> 32) & WORD) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def random_words(count: int, seed: int, offset: int, device: torch.device) -> torch.Tensor:
    """`count` words from place `offset` of the seed's sequence on, four to a place, as int64 of 0 to 2^32 - 1."""
    place = torch.arange(-(-count // 4), dtype=torch.int64, device=device) + offset
    zero = torch.zeros_like(place)
    words = philox([place & WORD, (place >> 32) & WORD, zero, zero], (seed & WORD, seed >> 32))
    return torch.stack(words, dim=1).view(-1)[:count]
