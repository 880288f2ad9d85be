"""The optimizer rules as parameter groups name them, and what each makes of a group's hyperparameters.

A group's key "optimizer" says by which rule its parameters are updated, "state_format" how its state is stored. Both
are fixed once the state is placed; every other key is read at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from zeroxide import _core
from zeroxide.config import RULES, Rule
from zeroxide.errors import ConfigError

__all__ = ["FIXED", "FORMAT", "RULE", "core_groups", "hyperparameters", "rule_of", "states", "taken_over"]

RULE = "optimizer"
FORMAT = "state_format"
FIXED = (RULE, FORMAT)
"""The keys of a group that its state was placed by."""

_TORCH: dict[type, type[Rule]] = {getattr(torch.optim, kind): rule for rule in RULES.values() for kind in rule.torch}


def hyperparameters(rule: type[Rule]) -> dict[str, Any]:
    """Every hyperparameter of `rule` with the config's default."""
    return {each.name: each.default for each in dataclasses.fields(rule)}


def states(rule: type[Rule]) -> tuple[str, ...]:
    """The names of the rule's own state tensors."""
    tensors = _core.state_tensors(_core_rule(rule, hyperparameters(rule)), "fp32", "float32")
    return tuple(name for name, *_ in tensors[1:])


def _core_rule(rule: type[Rule], group: Mapping[str, Any]) -> _core.Rule:
    """The rule with a group's numbers. Raises KeyError, TypeError, ValueError or, for a tensor, RuntimeError."""
    found: dict[str, float] = {}
    for name, default in hyperparameters(rule).items():
        if isinstance(default, tuple):
            beta1, beta2 = group[name]
            found |= {"beta1": float(beta1), "beta2": float(beta2)}
        else:
            found[name] = bool(group[name]) if isinstance(default, bool) else float(group[name])
    return _core.RULES[rule.name](**found)


def rule_of(group: Mapping[str, Any], number: int) -> type[Rule]:
    """The rule of group `number`; Adam where it names none. Raises ConfigError for a name that is none."""
    given = group.get(RULE, "adam")
    name = "adam" if str(given).lower() == "adamw" else str(given).lower()
    if name not in RULES:
        known = ", ".join(RULES)
        raise ConfigError(
            f"optimizer group {number}: {RULE} is {given!r}, expected one of {known}", path=RULE, got=str(given)
        )
    return RULES[name]


def taken_over(optimizer: torch.optim.Optimizer) -> type[Rule]:
    """The rule of one of torch's optimizers. Raises ConfigError for one that is none of ours."""
    kind = type(optimizer)
    if kind not in _TORCH:
        known = " or ".join(", ".join(each.__name__ for each in _TORCH).rsplit(", ", 1))
        raise ConfigError(
            f"optimizer {kind.__module__}.{kind.__name__} cannot be offloaded: use torch.optim.{known}",
            path="optimizer",
            got=kind.__name__,
        )
    return _TORCH[kind]


def core_groups(groups: Iterable[Mapping[str, Any]]) -> list[_core.Rule]:
    """The groups as the core takes them.

    Any number may be a tensor with one element. Raises ConfigError for a value that a step cannot take.
    """
    return [_core_group(number, group) for number, group in enumerate(groups)]


def _core_group(number: int, group: Mapping[str, Any]) -> _core.Rule:
    rule = rule_of(group, number)
    try:
        return _core_rule(rule, group)
    except KeyError as error:
        raise ConfigError(
            f"optimizer group {number} has no {error.args[0]}", path=f"optimizer.{error.args[0]}"
        ) from None
    except ValueError as error:
        # The core names the hyperparameter; what is no number at all does not get there.
        if str(error).partition(" is ")[0] in _NAMES:
            raise ConfigError(f"optimizer group {number}: {error}", path="optimizer") from None
        raise _no_number(number, error) from None
    except (TypeError, RuntimeError) as error:
        raise _no_number(number, error) from None


_NAMES = frozenset(name for rule in _core.RULES.values() for name in rule.hyperparameters)


def _no_number(number: int, error: Exception) -> ConfigError:
    return ConfigError(f"optimizer group {number} has a hyperparameter that is no number: {error}")
