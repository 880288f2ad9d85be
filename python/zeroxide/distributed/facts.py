"""What every rank must be alike in beside the config, as facts for `agree`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from zeroxide.distributed.agreement import Fact

if TYPE_CHECKING:
    from torch import nn

__all__ = ["model_facts", "sampler_facts", "version_facts"]


def version_facts() -> dict[str, Fact]:
    """Versions of zeroxide and torch, and Python's major.minor: other ones may order or round differently."""
    import torch

    from zeroxide._core import __version__

    return {
        "version.zeroxide": __version__,
        "version.torch": torch.__version__,
        "version.python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


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
