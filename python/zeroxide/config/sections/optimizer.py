"""`optimizer`: which rule updates the parameters, and its hyperparameters."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, cast

from pydantic import Field

from zeroxide.config.fields import NoEffect, Section, expecting
from zeroxide.config.given import Given, agree
from zeroxide.config.sections.rules import (
    SGD,
    Adagrad,
    AdagradParams,
    Lion,
    LionParams,
    Optimizer,
    OptimizerParams,
    Rule,
    SGDParams,
)
from zeroxide.errors import ConfigError

__all__ = ["Optimizer", "OptimizerSection", "resolve"]

_BUILT: dict[str, tuple[type[Section], type[Rule]]] = {
    "Adam": (OptimizerParams, Optimizer),
    "AdamW": (OptimizerParams, Optimizer),
    "Lion": (LionParams, Lion),
    "Adagrad": (AdagradParams, Adagrad),
    "SGD": (SGDParams, SGD),
}
"""By the names that DeepSpeed has for them: the keys, and what they come to."""

# DeepSpeed's own optimizers and torch's, which DeepSpeed takes by name.
_TO_COME = (
    *("lamb", "muon", "musgd", "muadam", "muadamw", "onebitadam", "onebitlamb", "zerooneadam"),
    *("rmsprop", "adadelta", "adamax", "nadam", "radam", "asgd", "rprop", "lbfgs", "sparseadam", "adafactor"),
)

_SHORTCUTS = ("lr", "betas", "eps", "weight_decay")


class OptimizerSection(Section):
    """`optimizer`. The keys of `params` depend on `type` and are checked once that is known."""

    type: Annotated[str, expecting("the name of an optimizer")]
    params: Annotated[dict[str, Any], expecting("an object")] = Field(default_factory=dict)
    legacy_fusion: Annotated[Any, NoEffect("the update is always one fused pass")] = None


def resolve(section: OptimizerSection | None, given: Given) -> Rule | None:
    """The optimizer that is asked for, None where nothing asks for one; shortcuts alone ask for AdamW.

    As in DeepSpeed, "Adam" is AdamW unless `adam_w_mode` is false. Raises ConfigError for another type, for a key that
    does not fit, and where a shortcut contradicts the document or is no hyperparameter of the optimizer.
    """
    base = "optimizer.params"
    kind, rule = "AdamW", cast(type[Rule], Optimizer)
    params: dict[str, Any] = {}
    if section is not None:
        kind = next((name for name in _BUILT if name.lower() == section.type.lower()), "")
        if not kind:
            raise given.unknown_type("optimizer.type", section.type, tuple(_BUILT), _TO_COME)
        if "max_grad_norm" in section.params:
            raise ConfigError(f'{given.origin}: unknown key "{base}.max_grad_norm": set "gradient_clipping" instead')
        model, rule = _BUILT[kind]
        keys = given.params(model, "optimizer", section.params)
        params = {name: value for name in model.model_fields if (value := getattr(keys, name)) is not None}
        if rule is Optimizer:
            params = _adam(params, section.type, given.origin)
    asked = section is not None
    for name in _SHORTCUTS:
        shortcut = getattr(given.shortcuts, name)
        if shortcut is None:
            continue
        asked = True
        if name not in {field.name for field in dataclasses.fields(rule)}:
            raise ConfigError(
                f"{name}={shortcut!r} is no hyperparameter of {kind}, which optimizer.type names; leave it out",
                path=f"{base}.{name}",
            )
        params[name] = agree(name, shortcut, f"{base}.{name}", params.get(name))
    if params.get("torch_adam") and params["decoupled"]:
        # The default of torch.optim.AdamW, which torch_adam asks for; that of torch.optim.Adam is 0.
        params.setdefault("weight_decay", 0.01)
    known = {field.name for field in dataclasses.fields(rule)}
    found = rule(**{name: value for name, value in params.items() if name in known})
    if isinstance(found, SGD):
        _check_nesterov(found, base)
    return found if asked else None


def _adam(params: dict[str, Any], kind: str, origin: str) -> dict[str, Any]:
    """`params` of Adam or AdamW with "decoupled". Raises ConfigError where AdamW is not to be decoupled."""
    decoupled = params.get("adam_w_mode", True)
    if kind.lower() == "adamw" and not decoupled:
        raise ConfigError(
            f'{origin}: optimizer.params.adam_w_mode = false contradicts optimizer.type = "{kind}"; '
            'use "Adam" for L2 regularisation',
            path="optimizer.params.adam_w_mode",
        )
    return {**params, "decoupled": decoupled}


def _check_nesterov(found: SGD, base: str) -> None:
    if found.nesterov and (found.momentum == 0 or found.dampening != 0):
        raise ConfigError(
            f"{base}.nesterov = true needs {base}.momentum above 0 and {base}.dampening = 0, got momentum "
            f"{found.momentum:g} and dampening {found.dampening:g}",
            path=f"{base}.nesterov",
        )
