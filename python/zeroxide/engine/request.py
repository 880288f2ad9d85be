"""What an engine is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroxide.parallel.pipe.stages import PipelineStages
from zeroxide.zero.init.materialize import WeightSource

__all__ = ["Request"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `initialize` was asked for, under its names."""

    model: nn.Module
    stages: PipelineStages | None = None
    """What `model` is this rank's part of, where it is cut already."""
    optimizer: torch.optim.Optimizer | Callable[..., Any] | None = None
    model_parameters: Any = None
    training_data: Any = None
    lr_scheduler: Any = None
    distributed_port: int = 29500
    collate_fn: Callable[..., Any] | None = None
    config: dict[str, Any] | str | Path | None = None
    weights: WeightSource | None = None
    shortcuts: dict[str, Any] = field(default_factory=dict)
