"""`optimizer.parameter_offload`: what libraries take off a DeepSpeed engine before they generate with it.

They gather all parameters, remove DeepSpeed's hooks for the time of a generation, and put them back. Here forwards
inside `GatheredParameters` compute with what that shows, hooks or not, so there is nothing to remove or put back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from zeroxide.errors import ModelError
from zeroxide.plan.plan import EXTERNAL

__all__ = ["ParameterCoordinator", "ParameterOffload", "external_parameters"]


def external_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (name, parameter) of those that modules of `module` have registered as used by them."""
    names = {id(param): name for name, param in module.named_parameters()}
    seen: set[int] = set()
    for each in module.modules():
        for param in each.__dict__.get(EXTERNAL, ()):
            if id(param) not in seen:
                seen.add(id(param))
                yield names.get(id(param), ""), param


class ParameterCoordinator:
    """The order of use, as DeepSpeed's callers see it. zeroxide takes that of the last pass by itself, so that none
    can be out of date."""

    def is_invalid_trace(self) -> bool:
        """True: there is nothing that would have to be forgotten."""
        return True


class ParameterOffload:
    """DeepSpeed's object for the parameters of a stage 3 engine."""

    def __init__(self, engine: nn.Module) -> None:
        self._engine = weakref.ref(engine)
        self.forward_hooks: list[Any] = []
        """Hooks to remove: none."""
        self.backward_hooks: list[Any] = []
        """Hooks to remove: none."""
        self.param_coordinator = ParameterCoordinator()

    @property
    def module(self) -> nn.Module:
        """The engine, which has all parameters and `ds_external_parameters`. Raises ModelError when it is gone."""
        engine = self._engine()
        if engine is None:
            raise ModelError("optimizer.parameter_offload was used after its engine was gone: keep the engine")
        return engine

    def _register_deepspeed_module(self, module: nn.Module, count: list[int] | None = None) -> None:
        """Puts hooks back that were removed: none were. Raises ModelError for another module than the engine's."""
        if module is not self.module and all(module is not each for each in self.module.modules()):
            raise ModelError(
                f"_register_deepspeed_module: a {type(module).__name__} is no part of this engine: zeroxide.initialize "
                "makes one for it"
            )
