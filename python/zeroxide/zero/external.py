"""Parameters that a module's forward uses though another module owns them."""

from __future__ import annotations

from torch import nn

from zeroxide.errors import ModelError
from zeroxide.plan.plan import EXTERNAL
from zeroxide.zero.param import sharded_param_of

__all__ = ["register_external_parameter", "unregister_external_parameter"]


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Says that `module`'s forward uses `parameter`: it is there whenever that runs, as if the module owned it.

    Called before `zeroxide.initialize`, in the module's `__init__` for example; tied parameters need no such call. The
    parameter is then held from its first use in a forward to the end of backward. It is an error after `initialize`
    unless the parameter is held like that anyway.

    Raises ModelError when `parameter` is no parameter or its unit is made already.
    """
    if not isinstance(parameter, nn.Parameter):
        raise ModelError(f"register_external_parameter: expected a parameter, got {type(parameter).__name__}")
    sharded = sharded_param_of(parameter)
    if sharded is not None:
        if sharded.unit.held_through_backward and any(module is each for each in sharded.unit.modules):
            return
        raise ModelError(
            f"register_external_parameter: {sharded.name} is in unit {sharded.unit.name}, which is not gathered for "
            f"{type(module).__name__}: call it before zeroxide.initialize",
            name=sharded.name,
        )
    known = module.__dict__.setdefault(EXTERNAL, [])
    if all(parameter is not each for each in known):
        known.append(parameter)


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Takes `register_external_parameter` back; before `zeroxide.initialize`, since units are made there.

    Raises ModelError when it was not registered.
    """
    known = module.__dict__.get(EXTERNAL, [])
    if all(parameter is not each for each in known):
        raise ModelError(f"unregister_external_parameter: {type(module).__name__} has not registered that parameter")
    module.__dict__[EXTERNAL] = [each for each in known if each is not parameter]
