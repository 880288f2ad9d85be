"""What a script does to a model behind its engine's back: noticed before it can go wrong, and followed or refused.

The looks are cheap: whether parameters require gradients before a training forward; identities of what modules hold,
version counters and addresses before a step.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from zeroxide.errors import ModelError
from zeroxide.zero.param import ParameterContext, sharded_param_of
from zeroxide.zero.reduce.reducer import Reducer
from zeroxide.zero.unit import Unit

__all__ = ["ModelGuard"]


class ModelGuard:
    """Looks at one engine's model.

    keeps_edits: whether a change in place of a parameter that always shows its values counts.
    shared: whether other ranks see this rank's weights in the same memory.
    """

    def __init__(
        self, module: nn.Module, context: ParameterContext, reducer: Reducer, *, keeps_edits: bool, shared: bool
    ) -> None:
        self.module = module
        self.context = context
        self.reducer = reducer
        self.keeps_edits = keeps_edits
        self.shared = shared
        context.watches_data |= shared
        self.frozen = [
            (name, param)
            for unit in context.units
            for name, param, trainable in zip(unit.names, unit.params, unit.trainable, strict=True)
            if not trainable
        ]
        self.tables: list[dict[str, object]] = []
        """Every table of parameters and of modules in the model."""
        self.held: list[int] = []
        """The identities of what they hold, one after the other."""
        self._note_parts()

    def before_training(self) -> None:
        """Raises ModelError when parameters are trainable that the engine does not train, or were cast."""
        with torch._C.DisableTorchFunctionSubclass():
            thawed = [name for name, param in self.frozen if param.requires_grad]
            self.reducer.stay_last()
        if thawed:
            more = f" (and {len(thawed) - 1} more)" if len(thawed) > 1 else ""
            raise ModelError(
                f"{thawed[0]}{more} was frozen when zeroxide.initialize took the model over and requires a gradient "
                "now, which nothing would use: set requires_grad before zeroxide.initialize, or freeze it again",
                name=thawed[0],
            )
        if self.context.params_always_full:
            for unit in self.context.units:
                if positions := unit.replaced():
                    unit.check_replaced(positions)

    def check_parameters(self) -> None:
        """Raises ModelError unless the model has the parameters that it had when the engine took it over."""
        present: dict[int, str] = {}
        for name, param in self.module.named_parameters():
            present[id(param)] = name
            sharded = sharded_param_of(param)
            if sharded is None or sharded.context is not self.context:
                raise ModelError(
                    f"{name} has appeared in the model since zeroxide.initialize, and the engine would neither train "
                    "nor save it: add adapters, resize embeddings and replace modules before zeroxide.initialize, or "
                    "make a new engine",
                    name=name,
                )
        for unit in self.context.units:
            for name, param in zip(unit.names, unit.params, strict=True):
                if id(param) not in present:
                    raise ModelError(
                        f"{name} is no longer part of the model, whose engine still keeps it: take parts away before "
                        "zeroxide.initialize, or make a new engine",
                        name=name,
                    )

    def before_step(self) -> None:
        """Takes in what was done to parameters that always show their values, or raises ModelError.

        Also for a model that has other parameters than before. Not earlier: torch.func.functional_call puts others in
        their place for a while.
        """
        if self._present() != self.held:
            self.check_parameters()
            self._note_parts()
        for unit in self.context.units:
            if unit.lent:
                name = unit.names[next(iter(unit.lent))]
                raise ModelError(
                    f"step() inside GatheredParameters, which still shows the old values of {name}: leave the context "
                    "first",
                    name=name,
                )
            if self.context.params_always_full:
                self._look_at(unit)

    def _note_parts(self) -> None:
        self.tables = [table for each in self.module.modules() for table in (each._parameters, each._modules)]  # type: ignore[misc]
        self.held = self._present()

    def _present(self) -> list[int]:
        # Not as somebody who is about to use what the tables list.
        return [*map(id, chain.from_iterable(map(dict.values, self.tables)))]

    def _look_at(self, unit: Unit) -> None:
        if replaced := unit.replaced():
            unit.check_replaced(replaced)
        for position in replaced:
            same = self.shared and torch.equal(unit.views[position], unit.params[position].data)
            if self.shared and not same:
                raise self._refusal(unit.names[position], "had its .data replaced")
            unit.take_in(position)
        if self.keeps_edits:
            if self.context.on_device:
                with self.context.written(unit, replaced):
                    self.context.take_down_edits([unit])
            return
        if (name := unit.edited()) is not None:
            raise self._refusal(name, "was changed in place")
        for position in self.context.changed_by_hand(unit):
            raise self._refusal(unit.names[position], "was changed through its .data")

    def _refusal(self, name: str, what: str) -> ModelError:
        return ModelError(
            f"{name} {what}, and it is one copy for all ranks of this host, which each of them would change again: "
            "change it inside zeroxide.zero.GatheredParameters(params, modifier_rank=0)",
            name=name,
        )
