"""Losses that need less memory than what they are made of."""

from zeroxide.losses.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
