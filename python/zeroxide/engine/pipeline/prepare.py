"""From what `initialize` was given to stages: a model that is cut already, or one that the config has cut."""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from zeroxide.config import Config
from zeroxide.distributed import Ranks, agree
from zeroxide.errors import ConfigError
from zeroxide.parallel.pipe.module import PipelineModule
from zeroxide.parallel.pipe.stages import PipelineStages

__all__ = ["stages_for"]


def stages_for(
    world: Ranks, module: nn.Module, given: PipelineStages | None, config: Config, made: ExitStack
) -> PipelineStages | None:
    """The stages of a model; None without a pipeline. One that is not cut yet is cut in place, which `made` undoes.

    Called by all ranks. Raises ConfigError where the config and a model that is cut say different things, ModelError
    for a model that cannot be cut, RanksError where ranks have cut it otherwise.
    """
    stages = _stages(module, given, config, made)
    if stages is not None:
        agree(world, stages.facts())
    return stages


def _stages(module: nn.Module, given: PipelineStages | None, config: Config, made: ExitStack) -> PipelineStages | None:
    pipeline, mesh = config.pipeline, config.mesh
    if pipeline is None:
        return None
    if config.zeroxide.durable_every:
        raise ConfigError(
            "zeroxide.durable_every: commits of a pipeline are not built yet: save with engine.save_checkpoint",
            path="zeroxide.durable_every",
        )
    if given is None:
        if pipeline.activation_checkpoint_interval:
            raise ConfigError(
                "pipeline.activation_checkpoint_interval is for a PipelineModule: this model has its own, as "
                "model.gradient_checkpointing_enable() of Hugging Face",
                path="pipeline.activation_checkpoint_interval",
            )
        from zeroxide.parallel.pipe.cut import cut_model

        assert mesh is not None, "stages are an axis of it"
        cut = cut_model(
            module,
            mesh.pp,
            partition_method=pipeline.partition or "parameters",
            schedule=pipeline.schedule or "1f1b",
            stages_per_rank=pipeline.stages_per_rank or 1,
        )
        made.callback(cut.restore)
        return cut
    said = {
        "partition": (pipeline.partition, given.partition_method, "partition_method", "best"),
        "schedule": (pipeline.schedule, given.schedule, "schedule", None),
        "stages_per_rank": (pipeline.stages_per_rank, given.stages_per_rank, "stages_per_rank", None),
    }
    for key, (asked, has, argument, neutral) in said.items():
        if asked not in (None, neutral, has):
            raise ConfigError(
                f"pipeline.{key} = {asked}, and the model is cut already by {has!r}: give {argument} where it is",
                path=f"pipeline.{key}",
                expected=str(has),
                got=str(asked),
            )
    if pipeline.activation_checkpoint_interval:
        if not isinstance(given, PipelineModule):
            raise ConfigError(
                "pipeline.activation_checkpoint_interval is for a PipelineModule of layers",
                path="pipeline.activation_checkpoint_interval",
            )
        given.activation_checkpoint_interval = pipeline.activation_checkpoint_interval
    return given
