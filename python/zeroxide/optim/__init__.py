"""Optimizers over the Rust kernels, and learning-rate schedules.

Each class has the arguments and the documentation of its rule's description in `zeroxide.config.rules`.
"""

from zeroxide.optim.loops import DeepSpeedLoop, Loop

__all__ = [
    "SGD",
    "Adagrad",
    "AdamW",
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "Lion",
]


class AdamW(Loop, of="adam"):
    """AdamW for a plain PyTorch loop."""


class DeepSpeedCPUAdam(DeepSpeedLoop, of="adam"):
    """AdamW, or Adam where `adamw_mode` is false, under the name and with the arguments and defaults of DeepSpeed's."""


class Lion(Loop, of="lion"):
    """Lion for a plain PyTorch loop."""


class DeepSpeedCPULion(DeepSpeedLoop, of="lion"):
    """Lion under the name and with the arguments and defaults of DeepSpeed's."""


class Adagrad(Loop, of="adagrad"):
    """Adagrad for a plain PyTorch loop."""


class DeepSpeedCPUAdagrad(DeepSpeedLoop, of="adagrad"):
    """Adagrad under the name and with the arguments and defaults of DeepSpeed's."""


class SGD(Loop, of="sgd"):
    """SGD for a plain PyTorch loop."""
