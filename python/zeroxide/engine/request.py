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
    mpu: Any = None
    sequence: int | None = None
    """Ranks that share the sequences of a batch, as `mpu` or `mesh_param` says."""
    shortcuts: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> dict[str, int | None]:
        """What the config is told of ranks: those that the model is cut for, and those that share sequences."""
        return {"stages": None if self.stages is None else self.stages.num_stages, "sequence": self.sequence}
