"""Experts over ranks, as an engine's construction has them."""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from zeroxide.config import Config
from zeroxide.distributed import Job, ProcessMesh, Watch
from zeroxide.engine.request import Request
from zeroxide.moe.spread import SpreadExperts, spread_experts
from zeroxide.zero.leaf import set_z3_leaf_module

__all__ = ["take_experts"]


def take_experts(
    asked: Request, module: nn.Module, config: Config, job: Job, watch: Watch, made: ExitStack
) -> SpreadExperts:
    """Leaves this rank its own experts of those that are spread over ranks of `job`, which all call it.

    See `spread_experts`. made: what it registers the end of process groups on.
    """
    ranks = job.ranks
    mesh = ProcessMesh(ranks.rank, ranks.world, None if config.mesh is None else config.mesh.data_axes())
    found = spread_experts(module, config, ranks, mesh, watch.waiting, job.tensor)
    if found.ranks is not ranks:
        made.callback(found.ranks.close)
    found.take_from(asked.optimizer)
    for each in found.modules:
        # All of them are used together, and named alike on every rank.
        set_z3_leaf_module(each, True)
    return found
