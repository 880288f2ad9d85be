"""AdamW and Adam for a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from zeroxide.optim.core_optimizer import CoreOptimizer
from zeroxide.optim.groups import refuse_options

__all__ = ["AdamW", "DeepSpeedCPUAdam"]


class AdamW(CoreOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW computes it.

    lr, betas, eps, weight_decay: as in torch. What is placed where, the other arguments and what is raised: see
    `CoreOptimizer`.
    """

    rule: ClassVar[str] = "adam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        offload: str = "none",
        format: str = "split",
        host_memory: int | str | None = None,
        threads: int | None = None,
    ) -> None:
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        flags = {"decoupled": True, "bias_correction": True}
        super().__init__(
            params, {**numbers, **flags}, offload=offload, format=format, host_memory=host_memory, threads=threads
        )


class DeepSpeedCPUAdam(CoreOptimizer):
    """AdamW, or Adam where `adamw_mode` is false, under the name and with the arguments and defaults of DeepSpeed's.

    bias_correction: whether moments are divided by `1 - beta^step`. Raises ConfigError for what is not built,
    `amsgrad` and state below fp32; else as `CoreOptimizer`.
    """

    rule: ClassVar[str] = "adam"

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse_options({"amsgrad": amsgrad, "fp32_optimizer_states": fp32_optimizer_states})
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model_params, {**numbers, "decoupled": adamw_mode, "bias_correction": bias_correction})
