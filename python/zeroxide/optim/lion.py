"""Lion for a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from zeroxide.optim.core_optimizer import CoreOptimizer
from zeroxide.optim.groups import refuse_options

__all__ = ["DeepSpeedCPULion", "Lion"]


class Lion(CoreOptimizer):
    """Lion (Chen et al. 2023, algorithm 2), with decoupled weight decay.

    lr: learning rate. betas: share of the momentum in the direction of the update, and its decay. weight_decay: the
    weight shrinks by `lr * weight_decay`. The other arguments and what is raised: see `CoreOptimizer`.
    """

    rule: ClassVar[str] = "lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        offload: str = "none",
        format: str = "split",
        host_memory: int | str | None = None,
        threads: int | None = None,
    ) -> None:
        numbers = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, numbers, offload=offload, format=format, host_memory=host_memory, threads=threads)


class DeepSpeedCPULion(CoreOptimizer):
    """Lion under the name and with the arguments and defaults of DeepSpeed's, whose second beta is another.

    Raises ConfigError for state below fp32, which is not built; else as `CoreOptimizer`.
    """

    rule: ClassVar[str] = "lion"

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse_options({"fp32_optimizer_states": fp32_optimizer_states})
        super().__init__(model_params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
