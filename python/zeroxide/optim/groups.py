"""Hyperparameter groups: from what a user passes to what the core takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from zeroxide import _core
from zeroxide.config import FORMATS, Config
from zeroxide.config.state_formats import needs_bf16
from zeroxide.errors import ConfigError, InvalidValueError, ModelError
from zeroxide.optim.rules import FORMAT, RULE, core_groups, hyperparameters, rule_of, taken_over
from zeroxide.plan.state import StatePlan
from zeroxide.precision.policy import torch_dtype

__all__ = [
    "STEPPED",
    "HandsOver",
    "assign",
    "check_all_grouped",
    "check_format",
    "check_groups",
    "defaults_from",
    "groups_for",
    "plain",
    "planned",
    "refuse_options",
    "state_facts",
    "state_plans",
]


STEPPED = "the optimizer has already stepped: pass it before its first step"


def defaults_from(config: Config) -> dict[str, Any]:
    """The rule that the config names and its hyperparameters, as torch names them."""
    chosen = config.optimizer
    if chosen is None:
        raise ConfigError(
            'no optimizer: give one in the config ("optimizer": {"type": "AdamW", "params": {"lr": ...}}), '
            "as lr=..., or as an object",
            path="optimizer",
        )
    return {RULE: chosen.name, **{each.name: getattr(chosen, each.name) for each in dataclasses.fields(chosen)}}


def _with_defaults(group: Mapping[str, Any], number: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The group with every hyperparameter: the config's, or those of the rule that it names itself."""
    rule = rule_of({**defaults, **group}, number)
    own = defaults if rule.name == defaults[RULE] else hyperparameters(rule)
    return {**own, **group, RULE: rule.name}


@runtime_checkable
class HandsOver(Protocol):
    """An optimizer of a plain loop that an engine may take over."""

    def hand_over(self) -> list[dict[str, Any]]:
        """Its groups; the optimizer has no state from then on. Raises ConfigError where it has made a step."""


def _from_torch(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's own groups: a schedule made over it goes on driving them."""
    if isinstance(optimizer, HandsOver):
        return optimizer.hand_over()
    rule, kind = taken_over(optimizer), type(optimizer)
    for group in optimizer.param_groups:
        refuse_options(group)
    # Adagrad has its sums from the beginning; what is left in them is not looked at again.
    if any(state.get("step", 1) for state in optimizer.state.values() if state):
        raise ConfigError(STEPPED, path="optimizer")
    groups = []
    for group in optimizer.param_groups:
        # Hyperparameters stay what they are: one that is a tensor may be filled in place, and is read at every step.
        group.update({**rule.of_torch(kind.__name__, group), RULE: rule.name})
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
    if not group.get("fp32_optimizer_states", True):
        option = "fp32_optimizer_states"
        raise ConfigError(f"optimizer option {option}=False is not supported", path=f"optimizer.{option}")


def groups_for(
    module: nn.Module,
    config: Config,
    optimizer: Any,
    parameters: Any,
    elsewhere: frozenset[int] = frozenset(),
    replaced: Mapping[int, Sequence[nn.Parameter]] | None = None,
) -> list[dict[str, Any]]:
    """The parameter groups of one training run, each with every hyperparameter.

    `optimizer` is None, one of torch's (see `taken_over`), or a callable that makes one from parameters; `parameters`
    is None, an iterable of parameters or of (name, parameter), or of group dicts, which may name their own "optimizer"
    and "state_format". elsewhere: ids of parameters that another rank's part of the model has,
    which are left out. replaced: by the ids of parameters that were cut, those that stand in their place.
    Raises ConfigError or ModelError.
    """
    listed = _listed(module.parameters() if parameters is None else parameters, "model_parameters")
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(listed)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer: the callable returned a {type(optimizer).__name__}, expected a torch.optim optimizer",
                path="optimizer",
            )
    if optimizer is not None:
        groups = _from_torch(optimizer)
    else:
        defaults = defaults_from(config)
        if listed and isinstance(listed[0], Mapping):
            groups = [_with_defaults(_group(each, number), number, defaults) for number, each in enumerate(listed)]
        else:
            groups = [{**defaults, **_named(listed, "model_parameters")}]
    known = {id(param) for param in module.parameters()}
    for group in groups:
        _put_parts(group, replaced or {})
        # Frozen parameters take no part; a caller may freeze some and still pass all.
        kept = [param.requires_grad and id(param) not in elsewhere for param in group["params"]]
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


def _put_parts(group: dict[str, Any], replaced: Mapping[int, Sequence[nn.Parameter]]) -> None:
    """Puts the parts of parameters that were cut in their place, each with the name of all where there are names."""
    if all(id(param) not in replaced for param in group["params"]):
        return
    parts = [replaced.get(id(param), (param,)) for param in group["params"]]
    if "param_names" in group:
        names = zip(group["param_names"], parts, strict=True)
        group["param_names"] = [name for name, of in names for _ in of]
    group["params"] = [each for of in parts for each in of]


def state_plans(groups: Iterable[Mapping[str, Any]], config: Config) -> dict[int, StatePlan]:
    """How each parameter of the groups is updated and its state stored, by the parameter's id.

    A group without "state_format" has that of the config. Raises ConfigError for a format that does not exist, or that
    does not go with the precision.
    """
    compute = torch_dtype(config.precision.dtype)
    found = {}
    for number, (group, optimizer) in enumerate(zip(groups, core_groups(groups), strict=True)):
        format = group.get(FORMAT, config.precision.format)
        check_format(format, number)
        if format != "fp32" and config.precision.dtype != "bf16":
            raise ConfigError(
                f"optimizer group {number}: {FORMAT} {needs_bf16(format)}, got {config.precision.dtype} training; "
                'use "fp32"',
                path=FORMAT,
                expected='"fp32"',
                got=f'"{format}"',
            )
        plan = planned(optimizer, rule_of(group, number).name, format, compute, number)
        found.update({id(param): plan for param in group["params"]})
    return found


def check_format(format: object, number: int) -> None:
    """Raises ConfigError for what is no state format."""
    if format not in FORMATS:
        raise ConfigError(
            f"optimizer group {number}: {FORMAT} is {format!r}, expected one of {', '.join(FORMATS)}",
            path=FORMAT,
            got=str(format),
        )


def planned(optimizer: _core.Rule, rule: str, format: str, compute: torch.dtype, number: int) -> StatePlan:
    """How parameters of a group are updated.

    Raises ConfigError for a format that cannot keep what the rule starts from.
    """
    try:
        return StatePlan.of(optimizer, rule, format, compute)
    except InvalidValueError as error:
        raise ConfigError(f"optimizer group {number}: {error}", path=FORMAT, got=f'"{format}"') from error


def state_facts(groups: Iterable[Mapping[str, Any]], config: Config) -> dict[str, str | int | float | None]:
    """What all ranks must have alike for the state of the groups to be one state: the rule and format of each."""
    return {
        f"optimizer group {number}": f"{rule_of(group, number).name}, {group.get(FORMAT, config.precision.format)}"
        for number, group in enumerate(groups)
    }


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
