"""Experts as an engine's construction has them: over ranks, and only where tokens go to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import nn

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.distributed import Job, ProcessMesh, Ranks, Watch
from zeroxide.engine.request import Request
from zeroxide.moe.routed import Routing, route_experts
from zeroxide.moe.spread import SpreadExperts, spread_experts
from zeroxide.zero.leaf import set_z3_leaf_module
from zeroxide.zero.unit import Unit

__all__ = ["leave_out_unrouted", "take_experts"]


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


def leave_out_unrouted(
    module: nn.Module, config: Config, core: _core.Offload, units: Sequence[Unit], ranks: Ranks, watch: Watch
) -> list[Routing]:
    """Runs experts only where `ranks` have tokens for them, if the config asks for it, until what is returned is
    removed; if it asks for lazy ones, the core makes up for the steps that they miss."""
    asked = config.zeroxide.unrouted_experts
    if asked == "update":
        return []
    for unit in units:
        if asked == "lazy" and unit.routed and unit.num_trainable:
            core.set_lazy(unit.index)
    return route_experts(module, ranks, watch.waiting)
