"""When units are gathered and released: hooks on the modules that use them.

Forward: gathered before a unit's module runs, released after it. Backward: gathered when the gradient of the module's
output is known, released when the unit's own gradients have all landed. Three cases need more than that:

- A unit that is used by several modules (`span`) is held from its first use to the end of backward.
- Within backward, activation checkpointing runs forward again, and backward of the same module follows at once: the
  unit is not released in between.
- A unit with frozen parameters may still be needed after its last gradient has landed. It is released when the next
  unit is gathered in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from zeroxide.zero.gather import Gatherer
from zeroxide.zero.reduce import Reducer
from zeroxide.zero.unit import Unit

__all__ = ["Hooks"]


def in_backward() -> bool:
    """Whether this thread is inside an autograd backward pass."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


class Hooks:
    """All hooks of one model."""

    def __init__(self, module: nn.Module, gatherer: Gatherer, units: list[Unit]) -> None:
        self.gatherer = gatherer
        self.units = units
        self.reducer = Reducer(gatherer.core, units, self._gradients_complete)
        self.lingering: list[Unit] = []
        self.pending_end = False
        self.handles: list[Any] = []
        for unit in units:
            for owner in unit.modules:
                self._add(owner.register_forward_pre_hook(partial(self._before, unit), prepend=True))
                self._add(owner.register_forward_hook(partial(self._after, unit), always_call=True))
        # Prepended last, so that a pass begins before the first unit of it is gathered.
        self._add(module.register_forward_pre_hook(self._enter, prepend=True))
        self._add(module.register_forward_hook(self._leave, always_call=True))

    def _add(self, handle: Any) -> None:
        self.handles.append(handle)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not in_backward():
            self.gatherer.start_pass(torch.is_grad_enabled())

    def _before(self, unit: Unit, module: nn.Module, args: Any) -> None:
        self.gatherer.gather(unit)

    def _after(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        inside = in_backward()
        if not unit.span:
            self._on_gradient(output, partial(self._before_backward, unit))
            if not inside:
                self.gatherer.release(unit)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward():
            return
        if not self._on_gradient(output, self._backward_begins):
            self.gatherer.release_all()

    @staticmethod
    def _on_gradient(output: Any, act: Callable[[], None]) -> bool:
        """Runs `act` when the gradient of any tensor in `output` is known; whether there is such a tensor."""
        found = False

        def hook(grad: torch.Tensor) -> None:
            act()

        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(hook)
                found = True
        return found

    def _backward_begins(self) -> None:
        """The gradient of the model's own output is known: this is the outermost backward."""
        if self.pending_end:
            return
        self.pending_end = True
        self.reducer.expect_all()
        for unit in self.units:
            if unit.span:
                self.gatherer.gather(unit)
        Variable._execution_engine.queue_callback(self.end_backward)  # type: ignore[attr-defined]

    def _before_backward(self, unit: Unit) -> None:
        for other in self.lingering:
            if other is not unit:
                self.gatherer.release(other)
        self.lingering = [unit] if unit.has_frozen else []
        self.gatherer.gather(unit)

    def _gradients_complete(self, unit: Unit) -> None:
        if not unit.span and not unit.has_frozen:
            self.gatherer.release(unit)

    def end_backward(self) -> None:
        """Releases every unit. Called by autograd at the end of a backward, and after one that failed."""
        self.pending_end = False
        self.lingering = []
        self.gatherer.release_all()

    def close(self) -> None:
        """Removes all hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.reducer.close()
