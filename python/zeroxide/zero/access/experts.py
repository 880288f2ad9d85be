"""Values of experts that are spread over ranks: what all ranks have in the place of one rank's parameter."""

from __future__ import annotations

import torch
from torch import nn

from zeroxide.params.part import region_of
from zeroxide.zero.param import ShardedParam, sharded_param_of

__all__ = ["add_experts", "experts_of"]


def experts_of(module: nn.Module) -> list[tuple[str, ShardedParam]]:
    """The module's own parameters that are experts', by name, where ranks have different ones."""
    params = [(name, sharded_param_of(param)) for name, param in module._parameters.items() if param is not None]
    return [(name, sharded) for name, sharded in params if sharded is not None and sharded.unit.experts]


def add_experts(kept: dict[str, torch.Tensor], sharded: ShardedParam, name: str) -> None:
    """Adds what all ranks have in the place of a parameter, which is `name` in a dict: several parameters, or the parts
    of one. Every rank calls it."""
    region, found = region_of(sharded.param), _everywhere(sharded)
    if region is not None:
        # Experts are the first dimension, and their places in a row.
        kept[name] = torch.cat([values for _, values in found]).view(region.shape)
        return
    for each, values in found:
        kept[_renamed(name, sharded.name, each)] = values.view(sharded.shape)


def _everywhere(sharded: ShardedParam) -> list[tuple[str, torch.Tensor]]:
    """(name, all elements of the live weight, flat) of what each place of experts has here."""
    context, unit, mine = sharded.context, sharded.unit, sharded.read_live()
    with context.watch.waiting("the names of experts", unit.name):
        names = context.ranks.gather_objects(sharded.name)
    found = []
    for everyone in unit.groups.places:
        values = mine if everyone == unit.groups.everyone else torch.empty_like(mine)
        context.broadcast(values, everyone[0], unit.name)
        found.append((names[everyone[0]], values))
    return found


def _renamed(name: str, own: str, other: str) -> str:
    """`name`, which ends as `own` does or is an end of it, for the parameter whose full name is `other`: they differ in
    the numbers of experts."""
    parts = name.split(".")
    for back, (mine, theirs) in enumerate(zip(reversed(own.split(".")), reversed(other.split(".")), strict=True), 1):
        if mine != theirs:
            parts[-back] = theirs
    return ".".join(parts)
