"""Optimizers over the Rust kernels, and learning-rate schedules."""

from zeroxide.optim.adamw import AdamW

__all__ = ["AdamW"]
