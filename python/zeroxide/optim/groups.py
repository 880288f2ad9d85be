"""Hyperparameter groups: from what a user passes to what the core takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.errors import ConfigError, ModelError

__all__ = ["check_groups", "core_groups", "defaults_from", "groups_for"]

CoreGroup = tuple[float, float, float, float, float, bool, bool]


def defaults_from(config: Config) -> dict[str, Any]:
    """Adam's hyperparameters, as torch names them, from the config."""
    chosen = config.optimizer
    if chosen is None:
        raise ConfigError(
            'no optimizer: give one in the config ("optimizer": {"type": "AdamW", "params": {"lr": ...}}), '
            "as lr=..., or as an object",
            path="optimizer",
        )
    return {
        "lr": chosen.lr,
        "betas": chosen.betas,
        "eps": chosen.eps,
        "weight_decay": chosen.weight_decay,
        "decoupled": chosen.decoupled,
        "bias_correction": chosen.bias_correction,
    }


def _from_torch(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's own groups: a schedule made over it goes on driving them."""
    kind = type(optimizer)
    if kind not in (torch.optim.AdamW, torch.optim.Adam):
        raise ConfigError(
            f"optimizer {kind.__module__}.{kind.__name__} cannot be offloaded: use torch.optim.AdamW or "
            "torch.optim.Adam",
            path="optimizer",
            got=kind.__name__,
        )
    groups = []
    for group in optimizer.param_groups:
        for option in ("amsgrad", "maximize"):
            if group.get(option):
                raise ConfigError(f"optimizer option {option}=True is not supported", path=f"optimizer.{option}")
        group["decoupled"] = bool(group.get("decoupled_weight_decay", kind is torch.optim.AdamW))
        group["bias_correction"] = True
        for name in ("lr", "eps", "weight_decay"):
            group[name] = float(group[name])
        group["betas"] = tuple(float(beta) for beta in group["betas"])
        groups.append(group)
    if any(optimizer.state.values()):
        raise ConfigError("the optimizer has already stepped: pass it before its first step", path="optimizer")
    optimizer._opt_called = True  # type: ignore[attr-defined]  # its schedules need not warn: the engine steps
    return groups


def groups_for(module: nn.Module, config: Config, optimizer: Any, parameters: Any) -> list[dict[str, Any]]:
    """The parameter groups of one training run, each with every hyperparameter.

    `optimizer` is None, a torch Adam or AdamW, or a callable that makes one from parameters; `parameters` is None,
    an iterable of parameters, or of group dicts. Raises ConfigError or ModelError.
    """
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(list(parameters) if parameters is not None else list(module.parameters()))
    if optimizer is not None:
        groups = _from_torch(optimizer)
    else:
        defaults = defaults_from(config)
        listed: list[Any] = list(parameters) if parameters is not None else list(module.parameters())
        if listed and isinstance(listed[0], Mapping):
            groups = [{**defaults, **dict(group), "params": _as_list(group["params"])} for group in listed]
        else:
            groups = [{**defaults, "params": listed}]
    known = {id(param) for param in module.parameters()}
    for group in groups:
        # Frozen parameters take no part; a caller may freeze some and still pass all.
        group["params"] = [param for param in group["params"] if param.requires_grad]
        for param in group["params"]:
            if id(param) not in known:
                raise ModelError(
                    f"an optimizer group holds a parameter of shape {tuple(param.shape)} that the model does not have"
                )
    return [group for group in groups if group["params"]]


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def core_groups(groups: Iterable[Mapping[str, Any]]) -> list[CoreGroup]:
    """The groups as the core takes them: (lr, beta1, beta2, eps, weight_decay, decoupled, bias_correction)."""
    return [
        (
            float(group["lr"]),
            float(group["betas"][0]),
            float(group["betas"][1]),
            float(group["eps"]),
            float(group["weight_decay"]),
            bool(group["decoupled"]),
            bool(group["bias_correction"]),
        )
        for group in groups
    ]


def check_groups(groups: list[dict[str, Any]]) -> None:
    """Raises ConfigError when a parameter is in two groups."""
    seen: set[int] = set()
    for number, group in enumerate(groups):
        for param in group["params"]:
            if id(param) in seen:
                raise ConfigError(
                    f"a parameter of shape {tuple(param.shape)} is in two optimizer groups (again in group {number})",
                    path="model_parameters",
                )
            seen.add(id(param))
