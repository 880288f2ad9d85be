"""Experts over ranks: what every rank keeps of a model's expert layers, and who has the rest.

It is done before the engine plans: from then on the experts that a rank has are parameters like others, of units that
only the ranks with the same experts train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeroxide.config import Config, Mesh
from zeroxide.device.placement import has_values, in_host, in_host_memory, nothing_like, plain
from zeroxide.distributed import ProcessMesh, Ranks, split
from zeroxide.errors import ConfigError, ModelError
from zeroxide.moe.exchange import ExpertExchange, Waiting
from zeroxide.moe.experts import mark_expert
from zeroxide.moe.hugging_face import WEIGHTS, find_fused_experts, replace_forward
from zeroxide.moe.layer import MoE
from zeroxide.params.handle import handle_of
from zeroxide.params.part import Region, mark_part

__all__ = ["SpreadExperts", "expert_parallel_size", "spread_experts", "spread_on_paper", "with_experts"]


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


def expert_parallel_size(module: nn.Module, config: Config, *, in_parts: bool = False) -> int:
    """Ranks over which the model's experts are spread: what `zeroxide.mesh.ep` says, or else the layers' own `ep_size`
    or `expert_parallel.autoep_size`.

    Raises ConfigError where these differ.
    """
    sizes = {
        f"the ep_size of {name}": each.ep_size
        for name, each in module.named_modules()
        if isinstance(each, MoE) and each.ep_size > 1
    }
    if config.expert_parallel.autoep_size > 1:
        sizes["expert_parallel.autoep_size"] = config.expert_parallel.autoep_size
    if config.mesh is not None and config.mesh.ep > 1:
        if not sizes and not in_parts:
            raise _wrong_size(
                config.mesh.ep,
                1,
                f"{type(module).__name__} has no experts to be spread: give its MoE layers ep_size={config.mesh.ep}, "
                "or set expert_parallel for a model of Hugging Face's",
            )
        sizes["zeroxide.mesh.ep"] = config.mesh.ep
    first = next(iter(sizes), "")
    for name, size in sizes.items():
        if size != sizes[first]:
            raise _wrong_size(size, sizes[first], f"{name} is {size} and {first} is {sizes[first]}: make them one")
    return sizes.get(first, 1)


def _wrong_size(got: int, expected: int, why: str) -> ConfigError:
    line = f"zeroxide.mesh.ep: expected {expected}, got {got}: {why}"
    return ConfigError(line, path="zeroxide.mesh.ep", expected=str(expected), got=str(got))


def with_experts(config: Config, module: nn.Module, world: int, *, in_parts: bool = False) -> Config:
    """The config with the axis over which the model's experts are spread, where it does not name one.

    in_parts: other ranks may have the layers with experts. Raises ConfigError as `expert_parallel_size`, and where that
    does not divide the ranks of a shard group.
    """
    size = expert_parallel_size(module, config, in_parts=in_parts)
    axes = config.mesh or Mesh(dp_shard=world)
    if size == axes.ep:
        return config
    if config.zero.stage == 0:
        # Every rank keeps all that it trains, however they are grouped.
        axes = dataclasses.replace(axes, dp_replicate=1, dp_shard=axes.dp_replicate * axes.dp_shard)
    if axes.dp_shard * axes.sp % size:
        raise ConfigError(
            f"ep_size = {size} of the model's MoE layers does not divide dp_shard * sp = {axes.dp_shard * axes.sp}, "
            "the ranks over which experts are spread",
            path="zeroxide.mesh.ep",
            expected=f"a divisor of {axes.dp_shard * axes.sp}",
            got=str(size),
        )
    return dataclasses.replace(config, mesh=dataclasses.replace(axes, ep=size))


def spread_experts(
    module: nn.Module, config: Config, ranks: Ranks, mesh: ProcessMesh, waiting: Waiting, tensor: Ranks
) -> SpreadExperts:
    """Leaves every rank its own experts, with rank 0's values. Called by all ranks.

    ranks, mesh: those that have this part of the model, and the mesh of them alone. tensor: those that compute the same
    tokens, and have the same experts. A model whose construction fails
    afterwards lacks the others' experts. Raises ModelError for experts that `zero.Init` has cut or that do not divide,
    ConfigError for what `expert_parallel` does not find, and RanksError when a rank is lost.
    """
    fused = find_fused_experts(module, config)
    layers = [(name, each) for name, each in module.named_modules() if isinstance(each, MoE) and each.ep_size > 1]
    if mesh.ep == 1:
        for _, each in fused:
            replace_forward(each, None)
        return SpreadExperts(ranks, (), frozenset(), frozenset())
    for name, each in fused:
        _check_divides(name, each, mesh.ep)
    for name, param in _experts_in(layers, fused):
        _check_uncut(name, param)
    position = mesh.expert_group().position
    together = split(ranks, mesh.expert_groups())
    params: set[int] = set()
    dropped: set[int] = set()
    for name, layer in layers:
        every = list(layer.deepspeed_moe.experts.parameters())
        for param in every:
            _share(param, ranks, tensor)
        layer.spread(ExpertExchange(together, position, name, waiting))
        kept = {id(param) for param in layer.deepspeed_moe.experts.parameters()}
        for param in every:
            if id(param) not in kept:
                dropped.add(id(param))
                param.data = nothing_like(param)
        params |= kept
    for name, each in fused:
        for weight in each.parameters():
            _share(weight, ranks, tensor)
            _cut(weight, position, mesh.ep)
            params.add(id(weight))
            mark_expert(weight, f"ep_size_{mesh.ep}")
        replace_forward(each, ExpertExchange(together, position, name, waiting))
    modules = (*(layer.deepspeed_moe.experts for _, layer in layers), *(each for _, each in fused))
    return SpreadExperts(together, modules, frozenset(params), frozenset(dropped))


def _experts_in(
    layers: list[tuple[str, MoE]], fused: list[tuple[str, nn.Module]]
) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in layers:
        yield from layer.deepspeed_moe.experts.named_parameters(f"{name}.deepspeed_moe.experts")
    for name, module in fused:
        yield from module.named_parameters(name)


def spread_on_paper(
    module: nn.Module, config: Config, ep: int, exchange: Callable[[str], ExpertExchange]
) -> tuple[list[nn.Module], frozenset[int]]:
    """Leaves a model of shapes alone the first of `ep` ranks' fused experts, reached by what `exchange` makes of a
    layer's name. Returns the modules of all experts, and the ids of parameters that other ranks have others of.

    Raises ModelError and ConfigError as `spread_experts`.
    """
    fused = find_fused_experts(module, config)
    params: set[int] = set()
    for name, each in fused:
        _check_shared_alike(name, each, ep)
        for weight in each.parameters() if ep > 1 else ():
            _cut(weight, 0, ep)
            params.add(id(weight))
            mark_expert(weight, f"ep_size_{ep}")
        replace_forward(each, exchange(name) if ep > 1 else None)
    return [each for _, each in fused], frozenset(params)


def _check_divides(name: str, experts: nn.Module, ep: int) -> None:
    param = _check_shared_alike(name, experts, ep)
    if not has_values(param):
        raise ModelError(
            f"{name} is on the meta device, and fused experts are cut from real weights: build the model in host "
            "memory",
            name=name,
        )


def _check_shared_alike(name: str, experts: nn.Module, ep: int) -> nn.Parameter:
    """Its first weight."""
    param = experts._parameters[WEIGHTS[0]]
    assert param is not None, "it was found by it"
    if param.shape[0] % ep:
        raise ModelError(
            f"{name} has {param.shape[0]} experts, which {ep} ranks cannot share alike: make "
            "expert_parallel.autoep_size a divisor of them",
            name=name,
        )
    return param


def _check_uncut(name: str, param: nn.Parameter) -> None:
    if handle_of(param) is not None:
        raise ModelError(
            f"{name} was cut by zero.Init over all ranks, and experts are to be spread over them: build the model "
            "without zero.Init",
            name=name,
        )


def _cut(param: nn.Parameter, position: int, ep: int) -> None:
    """Leaves the parameter the experts at `position`."""
    full = tuple(param.shape)
    number = full[0] // ep
    with torch.no_grad():
        param.data = param.data[position * number : (position + 1) * number].clone()
    mark_part(param, Region(full, 0, ((position * number, number),)))


def _share(param: nn.Parameter, ranks: Ranks, tensor: Ranks) -> None:
    """Gives every rank the first rank's values of a parameter that they all still have."""
    if not has_values(param):
        return
    with torch.no_grad():
        here = in_host_memory(param) and param.is_contiguous()
        values = param.detach() if here else plain(in_host(param.detach()))
        if ranks.rank == 0:
            tensor.broadcast_tensor(values)
        ranks.broadcast_tensor(values)
        if not here:
            param.copy_(values)
