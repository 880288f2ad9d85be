"""`optimizer`: which rule updates the parameters, and its hyperparameters."""

from __future__ import annotations

import typing
from typing import Annotated, Any, cast

from pydantic import Field, create_model

from zeroxide.config.check import show
from zeroxide.config.fields import Flag, NoEffect, NotBuilt, Section, expecting
from zeroxide.config.given import Given, agree
from zeroxide.config.rules import RULES, Optimizer, Rule
from zeroxide.errors import ConfigError

__all__ = ["OptimizerSection", "keys_of", "resolve", "types"]

_BUILT: dict[str, type[Rule]] = {kind: rule for rule in RULES.values() for kind in rule.types}
"""By the names that DeepSpeed has for them."""

# DeepSpeed's own optimizers and torch's, which DeepSpeed takes by name.
_TO_COME = (
    *("lamb", "muon", "musgd", "muadam", "muadamw"),
    *("rmsprop", "adadelta", "adamax", "nadam", "radam", "asgd", "rprop", "lbfgs", "sparseadam", "adafactor"),
)

_REMOVED = ("onebitadam", "onebitlamb", "zerooneadam")
"""What DeepSpeed had before 0.19.8."""

_SHORTCUTS = ("lr", "betas", "eps", "weight_decay")


class OptimizerSection(Section):
    """`optimizer`. The keys of `params` depend on `type` and are checked once that is known."""

    type: Annotated[str, expecting("the name of an optimizer")]
    """The optimizer. "Adam" is AdamW unless adam_w_mode says no."""
    params: Annotated[dict[str, Any], expecting("an object")] = Field(default_factory=dict)
    """Its hyperparameters."""
    legacy_fusion: Annotated[Any, NoEffect("the update is always one fused pass")] = None


class _Params(Section):
    """What every optimizer's `params` may have."""

    fused: Annotated[Any, NoEffect("the update is always one fused pass")] = None
    foreach: Annotated[Any, NoEffect("the update is always one fused pass")] = None
    capturable: Annotated[Any, NoEffect("the update is not part of a CUDA graph")] = None
    differentiable: Annotated[Any, NotBuilt("differentiating through the optimizer")] = None
    maximize: Annotated[Flag | None, NotBuilt("maximising the loss")] = None


def types() -> dict[str, type[Rule]]:
    """The rule of each `optimizer.type`, in DeepSpeed's spelling."""
    return dict(_BUILT)


def keys_of(rule: type[Rule]) -> type[Section]:
    """The keys of `optimizer.params` for `rule`: its hyperparameters, unless they are keyless, and its further keys."""
    hints = typing.get_type_hints(rule, include_extras=True)
    keys: dict[str, Any] = {name: (hints[name] | None, None) for name in rule.names() if name not in rule.keyless}
    keys.update({name: (kind, None) for name, kind in rule.keys.items()})
    return cast(type[Section], create_model(f"{rule.__name__}Params", __base__=_Params, **keys))


def resolve(section: OptimizerSection | None, given: Given) -> Rule | None:
    """The optimizer that is asked for, None where nothing asks for one; shortcuts alone ask for AdamW.

    Raises ConfigError for a type that is none, for a key that does not fit, and where a shortcut contradicts the
    document or is no hyperparameter of the optimizer.
    """
    base = "optimizer.params"
    kind, rule = "AdamW", cast(type[Rule], Optimizer)
    params: dict[str, Any] = {}
    if section is not None:
        kind = next((name for name in _BUILT if name.lower() == section.type.lower()), "")
        if section.type.lower() in _REMOVED:
            raise ConfigError(
                f'{given.origin}: optimizer.type: "{section.type}": neither zeroxide nor DeepSpeed 0.19.8 has 1-bit '
                'optimizers; use "AdamW", and zero_optimization.zero_quantized_gradients where the network is slow',
                path="optimizer.type",
                got=show(section.type),
            )
        if not kind:
            raise given.unknown_type("optimizer.type", section.type, tuple(_BUILT), _TO_COME)
        if "max_grad_norm" in section.params:
            raise ConfigError(f'{given.origin}: unknown key "{base}.max_grad_norm": set "gradient_clipping" instead')
        rule = _BUILT[kind]
        keys = given.params(keys_of(rule), "optimizer", section.params)
        params = {name: value for name in type(keys).model_fields if (value := getattr(keys, name)) is not None}
    asked = section is not None
    for name in _SHORTCUTS:
        shortcut = getattr(given.shortcuts, name)
        if shortcut is None:
            continue
        asked = True
        if name not in rule.names():
            raise ConfigError(
                f"{name}={shortcut!r} is no hyperparameter of {kind}, which optimizer.type names; leave it out",
                path=f"{base}.{name}",
            )
        params[name] = agree(name, shortcut, f"{base}.{name}", params.get(name))
    params = rule.of_keys(params, section.type if section is not None else kind, given.origin)
    found = rule(**{name: value for name, value in params.items() if name in rule.names()})
    found.check(base)
    return found if asked else None
