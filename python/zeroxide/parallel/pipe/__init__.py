"""Pipelines: models cut into stages, each on ranks of its own. `zeroxide.initialize` takes a `PipelineModule`."""

from __future__ import annotations

from zeroxide.parallel.pipe.layers import LayerSpec, TiedLayerSpec
from zeroxide.parallel.pipe.module import PipelineModule
from zeroxide.parallel.pipe.topology import (
    PipeDataParallelTopology,
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
    ProcessTopology,
)

__all__ = [
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "PipelineParallelGrid",
    "ProcessTopology",
    "TiedLayerSpec",
]
