"""Experts over ranks: what every rank keeps of a model's expert layers, and who has the rest.

It is done before the engine plans: from then on the experts that a rank has are parameters like others, of units that
only the ranks with the same experts train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeroxide.config import Config, Mesh
from zeroxide.device.placement import has_values, in_host_memory
from zeroxide.distributed import ProcessMesh, Ranks, split
from zeroxide.errors import ConfigError, ModelError
from zeroxide.moe.exchange import ExpertExchange, Waiting
from zeroxide.moe.layer import MoE
from zeroxide.params.handle import handle_of

__all__ = ["SpreadExperts", "expert_parallel_size", "spread_experts", "with_experts"]


@dataclass(frozen=True)
class SpreadExperts:
    """What `spread_experts` has done."""

    ranks: Ranks
    """Those over which experts are spread; close them when the engine ends, where they are not the engine's own."""
    modules: tuple[nn.Module, ...]
    """Those that have experts of this rank, one for each layer."""
    params: frozenset[int]
    """Ids of the parameters of experts of this rank."""
    dropped: frozenset[int]
    """Ids of those of other ranks' experts, which the model no longer has here."""

    def without_dropped(self, given: Any) -> Any:
        """Parameters, (name, parameter) pairs, or optimizer groups of either, as a user gives them: without those that
        are on other ranks."""
        if given is None or not self.dropped:
            return given
        return list(self._kept(given))

    def take_from(self, optimizer: Any) -> None:
        """Takes the parameters of experts on other ranks out of a torch optimizer's groups."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            return
        for group in optimizer.param_groups:
            kept = [id(param) not in self.dropped for param in group["params"]]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [each for each, keep in zip(group[key], kept, strict=True) if keep]

    def _kept(self, given: Iterable[Any]) -> Iterator[Any]:
        for each in given:
            if isinstance(each, Mapping):
                yield {**each, "params": list(self._kept(each["params"]))}
            elif id(each[1] if isinstance(each, tuple) else each) not in self.dropped:
                yield each


def expert_parallel_size(module: nn.Module, config: Config) -> int:
    """Ranks over which the model's experts are spread: what `zeroxide.mesh.ep` says, or the layers' own `ep_size`.

    Raises ConfigError where these differ, and ModelError where two layers differ.
    """
    sizes = {name: each.ep_size for name, each in module.named_modules() if isinstance(each, MoE) and each.ep_size > 1}
    asked = 1 if config.mesh is None else config.mesh.ep
    for name, size in sizes.items():
        first, expected = next(iter(sizes.items()))
        if size != expected:
            raise ModelError(
                f"{name} has ep_size = {size}, and {first} has {expected}: expected one for all layers", name=name
            )
        if asked not in (1, size):
            raise ConfigError(
                f"zeroxide.mesh.ep: expected {size}, the ep_size of {name}, got {asked}: make them one, or leave the "
                "key out",
                path="zeroxide.mesh.ep",
                expected=str(size),
                got=str(asked),
            )
    if asked > 1 and not sizes:
        raise ConfigError(
            f"zeroxide.mesh.ep is {asked}, and {type(module).__name__} has no experts to be spread: give its MoE "
            f"layers ep_size={asked}",
            path="zeroxide.mesh.ep",
            expected="1",
            got=str(asked),
        )
    return max(sizes.values(), default=1)


def with_experts(config: Config, module: nn.Module, world: int) -> Config:
    """The config with the axis over which the model's experts are spread, where it does not name one.

    Raises ConfigError as `expert_parallel_size`, and where that does not divide the ranks of a shard group.
    """
    size = expert_parallel_size(module, config)
    axes = config.mesh or Mesh(dp_shard=world)
    if size == axes.ep:
        return config
    if axes.dp_shard * axes.sp % size:
        raise ConfigError(
            f"ep_size = {size} of the model's MoE layers does not divide dp_shard * sp = {axes.dp_shard * axes.sp}, the "
            "ranks over which experts are spread",
            path="zeroxide.mesh.ep",
            expected=f"a divisor of {axes.dp_shard * axes.sp}",
            got=str(size),
        )
    return dataclasses.replace(config, mesh=dataclasses.replace(axes, ep=size))


def spread_experts(module: nn.Module, ranks: Ranks, mesh: ProcessMesh, waiting: Waiting) -> SpreadExperts | None:
    """Leaves every rank its own experts, with rank 0's values. Called by all ranks; None where nothing is spread.

    ranks, mesh: those that have this part of the model, and the mesh of them alone.
    Raises ModelError for experts that `zero.Init` has cut, and RanksError when a rank is lost.
    """
    layers = [(name, each) for name, each in module.named_modules() if isinstance(each, MoE) and each.ep_size > 1]
    if mesh.ep == 1 or not layers:
        return None
    before = {id(param) for param in module.parameters()}
    for name, layer in layers:
        for param_name, param in layer.deepspeed_moe.experts.named_parameters():
            _share(f"{name}.deepspeed_moe.experts.{param_name}", param, ranks)
    group = mesh.expert_group()
    together = split(ranks, mesh.expert_groups())
    for name, layer in layers:
        layer.spread(ExpertExchange(together, group.position, name, waiting))
    modules = tuple(layer.deepspeed_moe.experts for _, layer in layers)
    params = frozenset(id(param) for each in modules for param in each.parameters())
    return SpreadExperts(together, modules, params, frozenset(before - {id(param) for param in module.parameters()}))


def _share(name: str, param: nn.Parameter, ranks: Ranks) -> None:
    """Gives every rank rank 0's values of a parameter that they all still have."""
    if handle_of(param) is not None:
        raise ModelError(
            f"{name} was cut by zero.Init over all ranks, and experts are to be spread over them: build the model "
            "without zero.Init, on the meta device if it is large",
            name=name,
        )
    if not has_values(param):
        return
    with torch.no_grad():
        values = param.detach()
        if in_host_memory(values) and values.is_contiguous():
            ranks.broadcast_tensor(values)
        else:
            param.copy_(ranks.broadcast_tensor(values.cpu().contiguous()))
