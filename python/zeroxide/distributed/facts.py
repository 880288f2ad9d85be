"""What every rank must be alike in, as facts for `agree`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zeroxide.config import Config
from zeroxide.distributed.agreement import Fact

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PER_RANK", "config_facts", "model_facts", "sampler_facts", "version_facts"]

PER_RANK = {
    "offload_param.path": "each host has its own disks",
    "offload_optimizer.path": "each host has its own disks",
    "host_memory": "hosts may have different amounts of memory",
    "staging_bytes": "the size of disk requests in flight changes no number",
    "tile_bytes": "the size of a disk request changes no number",
    "io_engine": "a kernel may have io_uring and another not",
    "queue_depth": "it fits the host's disk",
    "threads": "it fits the host's processors; results do not depend on it",
    "rank_timeout": "rank 0's counts for all but itself; it changes no number",
    "trim_libraries": "it concerns one process's memory",
    "steps_per_print": "one rank may print and the others not",
    "wall_clock_breakdown": "one rank may print and the others not",
    "no_effect": "it says nothing beyond the other fields",
    "source": "it says nothing beyond the other fields",
}
"""Fields of `Config` that ranks may differ in, and why. Every other field is a fact."""


def version_facts() -> dict[str, Fact]:
    """Versions of zeroxide and torch, and Python's major.minor: other ones may order or round differently."""
    import torch

    from zeroxide._core import __version__

    return {
        "version.zeroxide": __version__,
        "version.torch": torch.__version__,
        "version.python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def config_facts(config: Config) -> dict[str, Fact]:
    """One fact for every value in the config that must agree, named "config." and its dotted path."""
    return {f"config.{path}": value for path, value in _flat(config, "") if path not in PER_RANK}


def _flat(value: Any, path: str) -> list[tuple[str, Fact]]:
    """The plain values below `value` with their dotted paths, in the order of the fields."""
    dot = f"{path}." if path else ""
    if path in PER_RANK:
        return []
    if dataclasses.is_dataclass(value):
        inside = [(each.name, getattr(value, each.name)) for each in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        inside = sorted(value.items())
    elif value is None or isinstance(value, (str, int, float)):
        return [(path, value)]
    else:
        return [(path, repr(value))]
    return [fact for name, each in inside for fact in _flat(each, f"{dot}{name}")]


def model_facts(module: nn.Module) -> dict[str, Fact]:
    """The parameters in order, each as "name dtype [shape] trained|frozen"; no values are read.

    Raises nothing for parameters on the meta device or already emptied: what they say of themselves is compared.
    """
    return {
        "model.parameters": [
            f"{name} {str(each.dtype).removeprefix('torch.')} {list(getattr(each, 'ds_shape', each.shape))} "
            f"{'trained' if each.requires_grad else 'frozen'}"
            for name, each in module.named_parameters()
        ]
    }


def sampler_facts(sampler: Any) -> dict[str, Fact]:
    """What makes the ranks' samplers cut one order of one data set: those attributes that `sampler` has, of torch's
    `DistributedSampler`'s: seed, epoch, shuffle, drop_last, num_replicas, and the lengths of data set and of `sampler`.
    """
    facts: dict[str, Fact] = {}
    for name in ("seed", "epoch", "shuffle", "drop_last", "num_replicas"):
        value = getattr(sampler, name, None)
        if isinstance(value, (bool, int, float, str)):
            facts[f"sampler.{name}"] = value
    for name, holder in (
        ("samples in the data set", getattr(sampler, "dataset", None)),
        ("samples of this rank", sampler),
    ):
        try:
            facts[f"sampler.{name}"] = len(holder)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):  # data sets of unknown length have none to compare
            continue
    return facts
