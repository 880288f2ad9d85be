"""From a plan to the core that holds its units."""

from __future__ import annotations

import os
import secrets

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.device.placement import DTYPE_NAMES, is_host
from zeroxide.distributed import Ranks, UnitGroups
from zeroxide.plan.plan import Plan
from zeroxide.plan.state import rounding_stream
from zeroxide.zero.disks import directories_of, measured_shares
from zeroxide.zero.durable import durable_facts, durable_job, is_durable, open_durable
from zeroxide.zero.on_device.core import with_device

__all__ = ["open_core"]


def open_core(plan: Plan, config: Config, ranks: Ranks) -> tuple[_core.Offload, str | None]:
    """The core for a plan, all memory and disk space reserved, weights undefined; and of a durable run what the last
    commit has noted, None where nothing was committed.

    Raises BudgetError, StorageError, and ConfigError for a run that cannot be durable.
    """
    durable = is_durable(plan, config)
    units = [
        _core.UnitSpec(
            name=unit.name,
            params=[(entry.words, entry.trainable) for entry in unit.params],
            weights=_core.WeightHome(_weight_home(plan, index)),
            state=_core.StateHome(home),
            optimizer=unit.state.optimizer,
            format=unit.state.format,
            held_through_backward=unit.held_through_backward,
            gradients=_core.GradientHome(plan.numbers.gradients),
            streams=[rounding_stream(config.precision.rounding_seed, entry.name) for entry in unit.params],
            mesh=_position(plan, plan.groups_of(index)) if unit.experts else None,
        )
        for index, (unit, home) in enumerate(zip(plan.units, plan.numbers.states, strict=True))
    ]
    directories = directories_of(plan, config)
    payload_limit = None if plan.limit is None else plan.limit - plan.resident_before
    settings = _core.Settings(
        limit=payload_limit,
        threads=plan.threads,
        compute=DTYPE_NAMES[plan.compute],
        grad=DTYPE_NAMES[plan.grad],
        tile_elements=plan.tile_elements,
        staging_bytes=plan.numbers.staging_bytes,
        gathered_bytes=plan.numbers.gathered_bytes,
        engine=_core.IoEngine(config.zeroxide.io_engine),
        queue_depth=config.aio.queue_depth,
        directories=directories,
        shares=measured_shares(directories),
        job=durable_job(config, ranks.rank) if durable else f"zeroxide-{os.getpid()}-{secrets.token_hex(4)}",
        mesh=_position(plan, plan.groups),
        comm_dtype=DTYPE_NAMES[plan.comm],
        quantisation=plan.quantisation.for_core(),
        reduce_scale=1.0 if config.gradients.reduce_sum else 1.0 / plan.world,
        # A device computes with copies of what has been gathered; between ranks others may wait for the update.
        defers_steps=not is_host(plan.device) and plan.world == 1,
        speculates=plan.early.speculates,
        durable=durable_facts(plan, config, ranks) if durable else None,
    )
    if durable:
        return open_durable(lambda: _core.Offload(settings, units), ranks)
    return with_device(_core.Offload(settings, units), plan.units_on_device), None


def _position(plan: Plan, groups: UnitGroups) -> _core.MeshPosition:
    return _core.MeshPosition(
        rank=groups.rank,
        shards=groups.shard.size,
        replicas=groups.replicate.size,
        transport=_core.Transport(plan.transport),
    )


def _weight_home(plan: Plan, unit: int) -> str:
    """Where a unit's weights are at home: a rank that keeps all of its shards has them there at all times."""
    home = plan.numbers.weights
    kept = plan.units[unit].experts and plan.groups_of(unit).shard.size == 1
    return "host" if home == "shard" and kept else home
