"""Engines whose model is cut into stages: what drives a pipeline, over an engine for this rank's stages."""

from __future__ import annotations

from zeroxide.engine.pipeline.engine import PipelineEngine

__all__ = ["PipelineEngine"]
