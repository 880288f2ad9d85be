"""Whether all ranks begin alike: versions, config and model; and the groups in which they go on."""

from __future__ import annotations

from typing import Any

from torch import nn

from zeroxide.config import Config
from zeroxide.config.facts import config_facts
from zeroxide.distributed import Job, ProcessMesh, Ranks, agree, model_facts, split_job, version_facts
from zeroxide.errors import ModelError
from zeroxide.zero.init.slices import slice_of

__all__ = ["meet"]


def meet(world: Ranks, module: nn.Module, config: Config, training_data: Any) -> Job:
    """The groups of the config's mesh, once all ranks are known to have the same config, and those of a group the same
    model. Called by all ranks.

    Raises RanksError on every rank where they differ, naming what does first, and ModelError where `zero.Init` has cut
    a model of which ranks are to have parts.
    """
    axes = config.mesh
    in_parts = axes is not None and axes.cuts_the_model
    given = {"sampler.training_data": "none" if training_data is None else "given"}
    # The model before the config, in which its dtype may be.
    model = {} if in_parts else model_facts(module)
    agree(world, {**version_facts(), **model, **config_facts(config), **given})
    job = split_job(world, ProcessMesh(world.rank, world.world, axes))
    if in_parts:
        try:
            _refuse_slices(module)
            agree(job.ranks, model_facts(module))
        except BaseException:
            job.close()
            raise
    return job


def _refuse_slices(module: nn.Module) -> None:
    for name, param in module.named_parameters():
        if slice_of(param) is not None:
            raise ModelError(
                f"{name} was cut by zero.Init over all ranks, and along pp and tp ranks have different parts of a "
                "model: build it without zero.Init, on the meta device if it is large",
                name=name,
            )
