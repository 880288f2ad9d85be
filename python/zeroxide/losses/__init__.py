"""Losses that need less memory than what they are made of."""

from zeroxide.losses.chunked_cross_entropy import chunked_cross_entropy
from zeroxide.losses.linear_cross_entropy import linear_cross_entropy

__all__ = ["chunked_cross_entropy", "linear_cross_entropy"]
