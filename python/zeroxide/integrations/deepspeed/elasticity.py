"""`compute_elastic_config`: one batch size for a job whose number of ranks changes.

The batch is a multiple that many numbers of ranks divide: a micro-batch, or the least common multiple of all, times a
highly composite number, as large as the limit allows; of these the one that most numbers of ranks divide. DeepSpeed has
removed the function in 0.19; answers are those of its 0.18.3 (elasticity versions 0.1 and 0.2).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zeroxide.errors import ConfigError
from zeroxide.integrations.deepspeed.logging import logger

__all__ = ["compute_elastic_config", "elasticity_enabled"]

_COMPOSITE = (
    *(1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080, 15120),
    *(20160, 25200, 27720, 45360, 50400, 55440, 83160, 110880, 166320, 221760, 277200, 332640, 498960, 554400),
    *(665280, 720720),
)
"""Numbers with more divisors than any smaller one (Ramanujan 1915, Highly composite numbers)."""


_KEYS = frozenset(
    (
        *("enabled", "ignore_non_elastic_batch_info", "max_gpus", "max_train_batch_size", "micro_batch_sizes"),
        *("min_gpus", "min_time", "model_parallel_size", "num_gpus_per_node", "prefer_larger_batch", "version"),
    )
)


@dataclass(frozen=True)
class _Asked:
    """The section "elasticity"."""

    limit: int
    micro: Sequence[int]
    least: int
    most: int
    per_node: int
    parallel: int
    larger: bool
    version: float


def elasticity_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Whether the config has a section "elasticity" that is on."""
    section = ds_config.get("elasticity")
    return isinstance(section, Mapping) and section.get("enabled", False) is True


def compute_elastic_config(
    ds_config: Mapping[str, Any],
    target_deepspeed_version: str | None = None,
    world_size: int = 0,
    return_microbatch: bool = False,
) -> tuple[int, list[int]] | tuple[int, list[int], int | None]:
    """(train batch size, numbers of ranks that divide it), and the micro-batch for `world_size` where that is given or
    `return_microbatch` asks for it. `target_deepspeed_version` has no effect: every release answered alike.

    Raises ConfigError for a section that is missing, off or wrong, and for a `world_size` that does not divide.
    """
    asked = _read(ds_config)
    micro: int | None
    if asked.version == 0.1:
        batch, ranks = _best(asked.micro, asked.limit, asked.least, asked.most, asked.larger)
        if not ranks:
            numbers = f"{asked.least} to {asked.most} ranks"
            raise _error(f"none of {numbers} divides a batch of at most {asked.limit}: set min_gpus lower", "min_gpus")
        micro = _micro_batch(batch, world_size, sorted(asked.micro, reverse=True)) if world_size else None
    else:
        batch, ranks, micro = _by_nodes(asked, world_size or _world_size())
    if world_size and world_size not in ranks:
        raise _error(f"{world_size} ranks do not divide a batch of {batch}: expected one of {ranks}", "world_size")
    if world_size:
        micro = _micro_batch(batch, world_size, sorted(asked.micro, reverse=True))
    if batch > asked.limit:
        # The least common multiple of all sizes counts whatever the limit is, as it did in DeepSpeed.
        logger.warning("elasticity: a batch of %d is above max_train_batch_size, %d", batch, asked.limit)
    if return_microbatch and micro is None:
        raise _error("return_microbatch: give world_size, for which the micro-batch is to be", "world_size")
    return (batch, ranks, micro) if world_size or return_microbatch else (batch, ranks)


def _by_nodes(asked: _Asked, world: int) -> tuple[int, list[int], int | None]:
    """Version 0.2: whole nodes come and go, and ranks share a model."""
    if asked.per_node % asked.parallel:
        raise _error(f"{asked.per_node} ranks a node are not a multiple of {asked.parallel} that share a model")
    share = asked.per_node // asked.parallel
    batch, nodes = _best(
        asked.micro, asked.limit // share, asked.least // asked.per_node, asked.most // asked.per_node, asked.larger
    )
    order = sorted(asked.micro, reverse=True) if asked.larger else list(asked.micro)
    ranks = [count * share for count in nodes]
    if world // asked.parallel in ranks:
        return batch * share, ranks, _micro_batch(batch * share, world, order)
    # A batch for the ranks that there are alone.
    here = world / asked.per_node * share
    batches = [math.floor(asked.limit / (micro * here)) * micro * here for micro in asked.micro]
    alone = int(max(batches) if asked.larger else min(batches))
    if alone == 0:
        raise _error(f"{world} ranks do not fit into a batch of {asked.limit}", "max_train_batch_size")
    return alone, [int(here)], _micro_batch(alone, world, order)


def _best(micro: Sequence[int], limit: int, least: int, most: int, larger: bool) -> tuple[int, list[int]]:
    least, most = least or 1, most or limit // min(micro)
    if max(micro) > limit:
        raise _error(f"micro_batch_sizes: {max(micro)} is above the limit of {limit}", "micro_batch_sizes")
    found: tuple[int, list[int]] = min(micro), []
    for base in {*micro, math.lcm(*micro)}:
        batch = base if base >= limit else base * max(each for each in _COMPOSITE if each <= limit // base)
        ranks = _dividing(batch, micro, least, most)
        better = batch > found[0] if larger else batch < found[0]
        if len(ranks) > len(found[1]) or (len(ranks) == len(found[1]) and better):
            found = batch, ranks
    return found


def _dividing(batch: int, micro: Sequence[int], least: int, most: int) -> list[int]:
    """Numbers of ranks of which each gets as many micro-batches of one of the sizes."""
    parts = {batch // each for each in micro if batch % each == 0}
    return [count for count in range(least, min(most, batch) + 1) if any(part % count == 0 for part in parts)]


def _micro_batch(batch: int, world: int, order: Sequence[int]) -> int | None:
    return next((each for each in order if batch // world % each == 0), None)


def _world_size() -> int:
    found = os.environ.get("WORLD_SIZE", "")
    if not found.isnumeric():
        raise _error(f"version 0.2 needs world_size, or WORLD_SIZE in the environment, got {found!r}", "world_size")
    return int(found)


def _read(config: Mapping[str, Any]) -> _Asked:
    section = config.get("elasticity")
    if not isinstance(section, Mapping):
        raise _error("the config has no section of that name")
    if not elasticity_enabled(config):
        raise _error("it is off: set enabled to true", "enabled")
    for key in section:
        if key not in _KEYS:
            raise _error(f"unknown key {key!r}", str(key))
    for key in ("max_train_batch_size", "micro_batch_sizes"):
        if key not in section:
            raise _error(f"{key}: required, and not given", key)
    limit = section["max_train_batch_size"]
    if type(limit) is not int or limit < 1:
        raise _error(f"max_train_batch_size: expected an integer above 0, got {limit!r}", "max_train_batch_size")
    micro = section["micro_batch_sizes"]
    if not isinstance(micro, list) or not micro or not all(type(each) is int and each > 0 for each in micro):
        raise _error(f"micro_batch_sizes: expected a list of integers above 0, got {micro!r}", "micro_batch_sizes")
    numbers = {"min_gpus": 1, "max_gpus": 10000, "num_gpus_per_node": 1, "model_parallel_size": 1}
    for key in numbers:
        numbers[key] = section.get(key, numbers[key])
        if type(numbers[key]) is not int or numbers[key] < 1:
            raise _error(f"{key}: expected an integer above 0, got {numbers[key]!r}", key)
    least, most, per_node, parallel = numbers.values()
    if most < least:
        raise _error(f"min_gpus is {least}, and max_gpus {most}", "min_gpus")
    version = section.get("version", 0.2)
    if version not in (0.1, 0.2):
        raise _error(f"version: expected 0.1 or 0.2, got {version!r}", "version")
    if parallel > 1 and version == 0.1:
        raise _error("model_parallel_size: version 0.1 knows none: set version to 0.2", "model_parallel_size")
    larger = bool(section.get("prefer_larger_batch", True))
    return _Asked(limit, micro, least, most, per_node, parallel, larger, version)


def _error(line: str, key: str | None = None) -> ConfigError:
    return ConfigError(f"elasticity: {line}", path="elasticity" if key is None else f"elasticity.{key}")
