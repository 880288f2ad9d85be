"""SGD for a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from zeroxide.optim.core_optimizer import CoreOptimizer

__all__ = ["SGD"]


class SGD(CoreOptimizer):
    """Stochastic gradient descent with momentum, as torch.optim.SGD computes it.

    lr, momentum, dampening, weight_decay, nesterov: as in torch; the momentum buffer is kept without momentum, too. The
    other arguments and what is raised: see `CoreOptimizer`.
    """

    rule: ClassVar[str] = "sgd"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        offload: str = "none",
        format: str = "split",
        host_memory: int | str | None = None,
        threads: int | None = None,
    ) -> None:
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(
            params,
            {**numbers, "nesterov": nesterov},
            offload=offload,
            format=format,
            host_memory=host_memory,
            threads=threads,
        )
