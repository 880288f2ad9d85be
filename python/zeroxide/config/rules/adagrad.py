"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zeroxide.config.fields import NonNegative
from zeroxide.config.rules.rule import AMSGRAD, FP32_STATES, DeepSpeedClass, Rule

__all__ = ["Adagrad"]


@dataclass(frozen=True)
class Adagrad(Rule):
    """Adagrad (Duchi, Hazan and Singer 2011), as torch.optim.Adagrad computes it.

    lr: learning rate. lr_decay: the rate is divided by `1 + (step - 1) * lr_decay`. weight_decay: `weight_decay *
    weight` is added to the gradient. initial_accumulator_value: what the sum of squares starts from. eps:
    added to its root.
    """

    name: ClassVar[str] = "adagrad"
    types: ClassVar[tuple[str, ...]] = ("Adagrad",)
    keys: ClassVar[Mapping[str, Any]] = {"amsgrad": AMSGRAD, "fp32_optimizer_states": FP32_STATES}
    torch: ClassVar[tuple[str, ...]] = ("Adagrad",)
    unsaved: ClassVar[tuple[str, ...]] = ("initial_accumulator_value",)
    deepspeed: ClassVar[DeepSpeedClass | None] = DeepSpeedClass(
        "DeepSpeedCPUAdagrad", {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0, "amsgrad": False}
    )

    lr: NonNegative = 1e-2
    lr_decay: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10
