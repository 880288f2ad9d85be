"""The optimizer rules as parameter groups name them, and what each makes of a group's hyperparameters.

A group's key "optimizer" says by which rule its parameters are updated, "state_format" how its state is stored. Both
are fixed once the state is placed; every other key is read at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zeroxide import _core
from zeroxide.config import SGD, Adagrad, Lion, Optimizer
from zeroxide.config import Rule as Hyperparameters
from zeroxide.errors import ConfigError

__all__ = ["FIXED", "FORMAT", "RULE", "RULES", "Rule", "core_groups", "rule_of", "taken_over"]

RULE = "optimizer"
FORMAT = "state_format"
FIXED = (RULE, FORMAT)
"""The keys of a group that its state was placed by."""


@dataclass(frozen=True)
class Rule:
    """One rule: its default hyperparameters, and how the core takes a group's."""

    defaults: Hyperparameters
    core: Callable[[Mapping[str, Any]], _core.Rule]
    """Of the hyperparameters in a group. Raises KeyError, TypeError or ValueError, also RuntimeError for a tensor."""
    people: str
    """What messages call it."""

    @property
    def name(self) -> str:
        """What a group calls it."""
        return self.defaults.name

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter with its default."""
        return {each.name: getattr(self.defaults, each.name) for each in dataclasses.fields(self.defaults)}

    @property
    def numbers(self) -> tuple[str, ...]:
        """The hyperparameters that a saved group must have: those that torch's optimizer of that name has, too."""
        own = ("decoupled", "bias_correction", "initial_accumulator_value")
        return tuple(name for name in self.hyperparameters if name not in own)

    @property
    def states(self) -> tuple[str, ...]:
        """The names of its own state tensors."""
        tensors = _core.state_tensors(self.core(self.hyperparameters), "fp32", "float32")
        return tuple(name for name, *_ in tensors[1:])


def _floats(group: Mapping[str, Any], *names: str) -> dict[str, float]:
    return {name: float(group[name]) for name in names}


def _betas(group: Mapping[str, Any]) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    return {"beta1": float(beta1), "beta2": float(beta2)}


def _adam(group: Mapping[str, Any]) -> _core.Rule:
    decoupled, bias_correction = bool(group["decoupled"]), bool(group["bias_correction"])
    numbers = _floats(group, "lr", "eps", "weight_decay") | _betas(group)
    return _core.Adam(**numbers, decoupled=decoupled, bias_correction=bias_correction)


def _lion(group: Mapping[str, Any]) -> _core.Rule:
    return _core.Lion(**_floats(group, "lr", "weight_decay"), **_betas(group))


def _adagrad(group: Mapping[str, Any]) -> _core.Rule:
    return _core.Adagrad(**_floats(group, "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"))


def _sgd(group: Mapping[str, Any]) -> _core.Rule:
    numbers = _floats(group, "lr", "momentum", "dampening", "weight_decay")
    return _core.SGD(**numbers, nesterov=bool(group["nesterov"]))


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(Optimizer(), _adam, "Adam or AdamW"),
        Rule(Lion(), _lion, "Lion"),
        Rule(Adagrad(), _adagrad, "Adagrad"),
        Rule(SGD(), _sgd, "SGD"),
    )
}

_TORCH: dict[type, str] = {
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adam",
    torch.optim.Adagrad: "adagrad",
    torch.optim.SGD: "sgd",
}


def rule_of(group: Mapping[str, Any], number: int) -> Rule:
    """The rule of group `number`; Adam where it names none. Raises ConfigError for a name that is none."""
    given = group.get(RULE, "adam")
    name = "adam" if str(given).lower() == "adamw" else str(given).lower()
    if name not in RULES:
        known = ", ".join(RULES)
        raise ConfigError(
            f"optimizer group {number}: {RULE} is {given!r}, expected one of {known}", path=RULE, got=str(given)
        )
    return RULES[name]


def taken_over(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule of one of torch's optimizers. Raises ConfigError for one that is none of ours."""
    kind = type(optimizer)
    if kind not in _TORCH:
        raise ConfigError(
            f"optimizer {kind.__module__}.{kind.__name__} cannot be offloaded: use torch.optim.AdamW, Adam, Adagrad or "
            "SGD",
            path="optimizer",
            got=kind.__name__,
        )
    return RULES[_TORCH[kind]]


def core_groups(groups: Iterable[Mapping[str, Any]]) -> list[_core.Rule]:
    """The groups as the core takes them.

    Any number may be a tensor with one element. Raises ConfigError for a value that a step cannot take.
    """
    return [_core_group(number, group) for number, group in enumerate(groups)]


def _core_group(number: int, group: Mapping[str, Any]) -> _core.Rule:
    rule = rule_of(group, number)
    try:
        return rule.core(group)
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


_NAMES = frozenset(name for rule in RULES.values() for name in rule.hyperparameters) | {"beta1", "beta2"}


def _no_number(number: int, error: Exception) -> ConfigError:
    return ConfigError(f"optimizer group {number} has a hyperparameter that is no number: {error}")
