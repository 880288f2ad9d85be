"""Durable runs on their way to a core: which can be, what they must have in common with the run that they continue, and
from which commit all ranks go on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.device.placement import DTYPE_NAMES
from zeroxide.distributed import Ranks
from zeroxide.errors import ConfigError, StorageError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan

__all__ = ["durable_facts", "durable_job", "is_durable", "open_durable"]

KEY = "zeroxide.durable_every"


def is_durable(plan: Plan, config: Config) -> bool:
    """Whether the run is to survive its process. An engine that only evaluates commits nothing.

    Raises ConfigError where it is asked for, and some state would be out of reach of a commit.
    """
    if not plan.durable:
        return False
    if Home.DISK not in (plan.weights, plan.state):
        raise ConfigError(
            f"{KEY}: nothing is at home on disk: give zero_optimization.offload_optimizer a device of nvme and its "
            "nvme_path, where commits are kept",
            path=KEY,
        )
    if plan.units_on_device:
        raise ConfigError(
            f"{KEY}: state at home on the device is not committed: offload_optimizer it to nvme", path=KEY
        )
    if config.zero.feedback is not None:
        raise ConfigError(
            f"{KEY}: what zero_optimization.zeropp_loco_param keeps of quantized gradients is not committed: leave one "
            "of the two out",
            path=KEY,
        )
    return True


def durable_job(config: Config, rank: int) -> str:
    """Name of a rank's directory below the path of its offloaded state."""
    return f"zeroxide-{config.zeroxide.durable_name}-rank{rank}"


def durable_facts(plan: Plan, config: Config, ranks: Ranks) -> list[tuple[str, str]]:
    """(name, value) of what a run must have in common with the one that it continues."""
    model = hashlib.blake2b(digest_size=8)
    for unit in plan.units:
        for entry in unit.params:
            said = (unit.name, entry.name, list(entry.shape), str(entry.dtype), entry.trainable)
            model.update(repr(said).encode())
    rules = sorted({unit.state.rule for unit in plan.units})
    return [
        ("world size", str(ranks.world)),
        ("rank", str(ranks.rank)),
        ("stage", str(plan.stage)),
        ("shards", f"{plan.groups.shard.size} x {plan.groups.replicate.size}"),
        ("dtype", DTYPE_NAMES[plan.compute]),
        ("format", ", ".join(plan.formats)),
        ("optimizer", ", ".join(rules)),
        ("homes of weights, state and gradients", f"{plan.numbers.weights}, {plan.numbers.state}, {plan.gradients}"),
        ("model with names and shapes", model.hexdigest()),
        ("tile elements", str(plan.tile_elements)),
    ]


def open_durable(make: Callable[[], _core.Offload], ranks: Ranks) -> tuple[_core.Offload, str | None]:
    """The core, gone on from the newest commit that all ranks have; and what that has noted.

    Raises StorageError on all ranks where one cannot open its store, or where they have no commit in common.
    """
    core: _core.Offload | None = None
    failed: Exception | None = None
    try:
        core = make()
        found = _core.Commits(core).found()
    except Exception as error:
        failed, found = error, []
    everyone = ranks.gather_objects([None if failed is None else str(failed), found])
    try:
        if failed is not None:
            raise failed
        assert core is not None, "made, or failed"
        for rank, (line, _) in enumerate(everyone):
            if line is not None:
                raise StorageError(f"rank {rank}: {line}")
        generation = _newest([commits for _, commits in everyone])
        return core, _core.Commits(core).adopt(generation) if found else None
    except BaseException:
        if core is not None:
            core.close()
        raise


def _newest(found: list[list[int]]) -> int:
    """The newest commit that all ranks have; 0 for none."""
    common = set(found[0]).intersection(*found[1:])
    latest = max((number for each in found for number in each), default=0)
    # A run that ended in its first commit has left it on some ranks alone. A later one, all have, or the one before it.
    if not common and latest > 1:
        said = "; ".join(f"rank {rank} has {each or 'none'}" for rank, each in enumerate(found))
        raise StorageError(
            f"the ranks of the durable run have no commit in common: {said}; a directory is missing or another run's: "
            "bring it back, or remove them all to start anew"
        )
    return max(common, default=0)
