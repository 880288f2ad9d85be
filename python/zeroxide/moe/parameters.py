"""Which parameters are experts', and optimizer groups that keep them apart: DeepSpeed's `moe.utils`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from zeroxide.errors import ModelError
from zeroxide.moe.layer import MoE

__all__ = [
    "configure_moe_param_groups",
    "has_moe_layers",
    "is_moe_param",
    "is_moe_param_group",
    "split_params_grads_into_shared_and_expert_params",
    "split_params_into_different_moe_groups_for_optimizer",
    "split_params_into_shared_and_expert_params",
]


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether the module has a `MoE` in it, and how many experts its first one has; 0 without."""
    found = next((module for module in m.modules() if isinstance(module, MoE)), None)
    return found is not None, 0 if found is None else found.num_experts


def is_moe_param(param: torch.Tensor) -> bool:
    """Whether the parameter is an expert's: not every rank has it, where experts are spread over ranks."""
    return not getattr(param, "allreduce", True)


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Whether the optimizer group is one that `split_params_into_different_moe_groups_for_optimizer` made."""
    return bool(param_group.get("moe"))


def split_params_into_shared_and_expert_params(
    params: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that are no expert's, and those that are."""
    every = list(params)
    return [each for each in every if not is_moe_param(each)], [each for each in every if is_moe_param(each)]


def split_params_grads_into_shared_and_expert_params(
    group: Iterable[nn.Parameter],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gradients, where there are any, of the parameters that are no expert's, and of those that are."""
    shared, experts = split_params_into_shared_and_expert_params(group)
    return [each.grad for each in shared if each.grad is not None], [
        each.grad for each in experts if each.grad is not None
    ]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | Iterable[dict[str, Any]], max_group_size: int | float | None = 178956971
) -> list[dict[str, Any]]:
    """Optimizer groups in which experts have groups of their own.

    Each of `param_groups` has "params" and a "name". It keeps what is no expert's; a group with the same options, "moe"
    True and the experts' group name as its "name" follows for every group name, and another where one would have more
    than `max_group_size` elements (None: never). Raises ModelError where a group with experts has no name, or two
    groups have the same.
    """
    given = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    taken: set[str] = set()
    for number, group in enumerate(given):
        if "name" not in group:
            raise ModelError(
                f'moe: optimizer group {number} has no "name": give every group that is to be split one, such as '
                f'{{"params": ..., "name": "group{number}"}}',
                name="name",
            )
        if group["name"] in taken:
            raise ModelError(
                f"moe: two optimizer groups have the name {group['name']!r}: expected names that differ", name="name"
            )
        taken.add(group["name"])
    apart: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for group in given:
        shared, experts = split_params_into_shared_and_expert_params(group["params"])
        kept.append({**group, "params": shared})
        by_name: dict[str, list[nn.Parameter]] = {}
        for param in experts:
            by_name.setdefault(getattr(param, "group_name", "ep_size_1"), []).append(param)
        for name, params in by_name.items():
            for part in _at_most(params, max_group_size):
                apart.append({**group, "name": name, "moe": True, "params": part})
    return kept + apart


def _at_most(params: list[nn.Parameter], size: int | float | None) -> list[list[nn.Parameter]]:
    """The parameters in order, cut where a part would have more elements than `size`."""
    parts: list[list[nn.Parameter]] = [[]]
    elements = 0
    for param in params:
        if size is not None and parts[-1] and elements + param.numel() > size:
            parts.append([])
            elements = 0
        parts[-1].append(param)
        elements += param.numel()
    return parts


def configure_moe_param_groups(model_parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Optimizer groups for parameters, or for groups of them, with experts apart."""
    given = list(model_parameters)
    if not given:
        raise ModelError("moe: there are no parameters to be put into groups", name="model_parameters")
    if isinstance(given[0], dict):
        named = [{"name": f"group{number}", **group} for number, group in enumerate(given)]
        return split_params_into_different_moe_groups_for_optimizer(named)
    return split_params_into_different_moe_groups_for_optimizer({"params": given, "name": "parameters"})
