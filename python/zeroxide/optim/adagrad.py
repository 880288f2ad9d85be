"""Adagrad for a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from zeroxide.optim.core_optimizer import CoreOptimizer
from zeroxide.optim.groups import refuse_options

__all__ = ["Adagrad", "DeepSpeedCPUAdagrad"]


class Adagrad(CoreOptimizer):
    """Adagrad (Duchi, Hazan and Singer 2011), as torch.optim.Adagrad computes it.

    lr, lr_decay, weight_decay, initial_accumulator_value, eps: as in torch. The other arguments and what is raised: see
    `CoreOptimizer`.
    """

    rule: ClassVar[str] = "adagrad"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        offload: str = "none",
        format: str = "split",
        host_memory: int | str | None = None,
        threads: int | None = None,
    ) -> None:
        numbers = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        start = {"initial_accumulator_value": initial_accumulator_value}
        super().__init__(
            params, {**numbers, **start}, offload=offload, format=format, host_memory=host_memory, threads=threads
        )


class DeepSpeedCPUAdagrad(CoreOptimizer):
    """Adagrad under the name and with the arguments and defaults of DeepSpeed's.

    Raises ConfigError for what is not built: `amsgrad`, and state below fp32; else as `CoreOptimizer`.
    """

    rule: ClassVar[str] = "adagrad"

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse_options({"amsgrad": amsgrad, "fp32_optimizer_states": fp32_optimizer_states})
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model_params, {**numbers, "lr_decay": 0.0, "initial_accumulator_value": 0.0})
