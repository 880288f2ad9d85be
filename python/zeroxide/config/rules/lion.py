"""Lion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zeroxide.config.fields import Betas, NonNegative
from zeroxide.config.rules.rule import FP32_STATES, DeepSpeedClass, Rule

__all__ = ["Lion"]


@dataclass(frozen=True)
class Lion(Rule):
    """Lion (Chen et al. 2023, algorithm 2), with decoupled weight decay.

    lr: learning rate. betas: share of the momentum in the direction of the update, and its decay, each in [0, 1).
    weight_decay: the weight shrinks by `lr * weight_decay`.
    """

    name: ClassVar[str] = "lion"
    types: ClassVar[tuple[str, ...]] = ("Lion",)
    keys: ClassVar[Mapping[str, Any]] = {"fp32_optimizer_states": FP32_STATES}
    loop_defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-4, "betas": (0.9, 0.99)}  # the paper's
    deepspeed: ClassVar[DeepSpeedClass | None] = DeepSpeedClass(
        "DeepSpeedCPULion", {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
    )

    lr: NonNegative = 1e-3
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
