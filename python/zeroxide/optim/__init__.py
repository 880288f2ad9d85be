"""Optimizers over the Rust kernels, and learning-rate schedules."""

from zeroxide.optim.adagrad import Adagrad, DeepSpeedCPUAdagrad
from zeroxide.optim.adamw import AdamW, DeepSpeedCPUAdam
from zeroxide.optim.lion import DeepSpeedCPULion, Lion
from zeroxide.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "AdamW",
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "Lion",
]
