"""Hyperparameter groups: from what a user passes to what the core takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.errors import ConfigError, ModelError

__all__ = [
    "assign",
    "check_all_grouped",
    "check_groups",
    "core_groups",
    "defaults_from",
    "groups_for",
    "plain",
    "refuse_options",
]


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
    for group in optimizer.param_groups:
        refuse_options(group)
    if any(optimizer.state.values()):
        raise ConfigError("the optimizer has already stepped: pass it before its first step", path="optimizer")
    groups = []
    for group in optimizer.param_groups:
        # Hyperparameters stay what they are: one that is a tensor may be filled in place, and is read at every step.
        group["decoupled"] = bool(group.get("decoupled_weight_decay", kind is torch.optim.AdamW))
        group["bias_correction"] = True
        groups.append(group)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # its schedules need not warn: the engine steps
    return groups


def refuse_options(group: Mapping[str, Any]) -> None:
    """Raises ConfigError for options of torch's optimizers that change what a step computes, and are not built.

    The others ("foreach", "fused", "capturable") only choose how torch computes it.
    """
    for option in ("amsgrad", "maximize", "differentiable"):
        if group.get(option):
            raise ConfigError(f"optimizer option {option}=True is not supported", path=f"optimizer.{option}")


def groups_for(module: nn.Module, config: Config, optimizer: Any, parameters: Any) -> list[dict[str, Any]]:
    """The parameter groups of one training run, each with every hyperparameter.

    `optimizer` is None, a torch Adam or AdamW, or a callable that makes one from parameters; `parameters` is None,
    an iterable of parameters or of (name, parameter), or of group dicts. Raises ConfigError or ModelError.
    """
    listed = _listed(module.parameters() if parameters is None else parameters, "model_parameters")
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(listed)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer: the callable returned a {type(optimizer).__name__}, expected a torch.optim.AdamW or Adam",
                path="optimizer",
            )
    if optimizer is not None:
        groups = _from_torch(optimizer)
    else:
        defaults = defaults_from(config)
        if listed and isinstance(listed[0], Mapping):
            groups = [{**defaults, **_group(each, number)} for number, each in enumerate(listed)]
        else:
            groups = [{**defaults, **_named(listed, "model_parameters")}]
    known = {id(param) for param in module.parameters()}
    for group in groups:
        # Frozen parameters take no part; a caller may freeze some and still pass all.
        kept = [param.requires_grad for param in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [each for each, keep in zip(group[key], kept, strict=True) if keep]
        for param in group["params"]:
            if id(param) not in known:
                raise ModelError(
                    f"an optimizer group holds a parameter of shape {tuple(param.shape)} that the model does not have"
                )
    groups = [group for group in groups if group["params"]]
    core_groups(groups)
    return groups


def _listed(given: Any, where: str) -> list[Any]:
    if isinstance(given, torch.Tensor | str | Mapping) or not isinstance(given, Iterable):
        raise ConfigError(
            f"{where}: expected parameters, (name, parameter) pairs or group dicts, got a {type(given).__name__}: "
            "pass model.parameters()",
            path=where,
            got=type(given).__name__,
        )
    return list(given)


def _group(given: Any, number: int) -> dict[str, Any]:
    where = f"model_parameters[{number}]"
    if not isinstance(given, Mapping) or "params" not in given:
        raise ConfigError(f"{where}: expected a dict with params, got {_kind(given)}", path=where)
    params = given["params"]
    return {**given, **_named([params] if isinstance(params, torch.Tensor) else _listed(params, where), where)}


def _named(given: list[Any], where: str) -> dict[str, Any]:
    """{"params": ...}, and "param_names" where they come with names, as torch keeps them."""
    pairs = [each if isinstance(each, tuple) and len(each) == 2 else (None, each) for each in given]
    for number, (_, param) in enumerate(pairs):
        if not isinstance(param, torch.Tensor):
            raise ConfigError(
                f"{where}: item {number} is {_kind(given[number])}, expected a parameter or a (name, parameter) pair",
                path=where,
            )
    found: dict[str, Any] = {"params": [param for _, param in pairs]}
    if given and all(isinstance(name, str) for name, _ in pairs):
        found["param_names"] = [name for name, _ in pairs]
    return found


def _kind(given: Any) -> str:
    return f"a {type(given).__name__}"


def core_groups(groups: Iterable[Mapping[str, Any]]) -> list[_core.Rule]:
    """The groups as the core takes them.

    Any number may be a tensor with one element. Raises ConfigError for a value that a step cannot take.
    """
    return [_core_group(number, group) for number, group in enumerate(groups)]


def _core_group(number: int, group: Mapping[str, Any]) -> _core.Rule:
    try:
        beta1, beta2 = group["betas"]
        numbers = {
            "lr": float(group["lr"]),
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
        }
        decoupled, bias_correction = bool(group["decoupled"]), bool(group["bias_correction"])
    except KeyError as error:
        raise ConfigError(
            f"optimizer group {number} has no {error.args[0]}", path=f"optimizer.{error.args[0]}"
        ) from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer group {number} has a hyperparameter that is no number: {error}") from None
    try:
        return _core.Adam(**numbers, decoupled=decoupled, bias_correction=bias_correction)
    except ValueError as error:
        raise ConfigError(f"optimizer group {number}: {error}", path="optimizer") from None


def assign(group: dict[str, Any], name: str, value: Any) -> None:
    """Sets a hyperparameter; one that is a tensor is filled, so that whoever holds it goes on driving it."""
    held = group.get(name)
    if isinstance(held, torch.Tensor) and isinstance(value, int | float | torch.Tensor):
        held.fill_(value)
    else:
        group[name] = value.clone() if isinstance(value, torch.Tensor) else value


def plain(value: Any) -> Any:
    """`value` with every tensor of one element in it as a number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()} if type(value) is dict else value
    if type(value) in (list, tuple):
        return type(value)(plain(each) for each in value)
    return value


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


def check_all_grouped(groups: list[dict[str, Any]], trainable: Iterable[Any]) -> None:
    """Raises ConfigError for trainable parameters that no group holds: they would get gradients and never change.

    Each of `trainable` has a `name` and its `param`.
    """
    chosen = {id(param) for group in groups for param in group["params"]}
    left = [each.name for each in trainable if id(each.param) not in chosen]
    if left:
        raise ConfigError(
            f"{len(left)} trainable parameters are in no optimizer group, the first is {left[0]}: add them to "
            "model_parameters or set requires_grad_(False)",
            path="model_parameters",
        )
