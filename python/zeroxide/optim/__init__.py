"""Optimizers over the Rust kernels, and learning-rate schedules."""

from zeroxide.optim.loops import SGD, Adagrad, AdamW, DeepSpeedCPUAdagrad, DeepSpeedCPUAdam, DeepSpeedCPULion, Lion

__all__ = [
    "SGD",
    "Adagrad",
    "AdamW",
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "Lion",
]
