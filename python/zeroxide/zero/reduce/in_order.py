"""Gradients of several micro-batches under way at once, each added in the order of the micro-batches.

Sums are rounded, so the order is part of the result. A parameter's gradients come in order by themselves where its unit
is used once in a forward, by one module: the backward of that module is run for one micro-batch after the other. Others
may come early, and then wait until those before them have been added or will not come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zeroxide.errors import ModelError
from zeroxide.zero.hook_handle import Hook
from zeroxide.zero.reduce.reducer import Reducer
from zeroxide.zero.unit import Unit

__all__ = ["GradientOrder"]

Key = tuple[int, int]
"""Unit and position of a parameter."""


class GradientOrder:
    """Stands before the hooks of a reducer, and lets through what is next."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self.now = 0
        """The micro-batch whose backward runs."""
        self._ended: set[int] = set()
        self._alone = True
        self._by_layer: set[int] = set()
        self._added: dict[Key, list[int]] = {}
        self._waiting: dict[Key, dict[int, tuple[Unit, torch.Tensor]]] = {}
        reducer.order = self
        reducer.put_before(lambda hook, unit, position: Hook(self._take, hook, unit, position))

    def begin(self, by_layer: set[int], *, alone: bool = True) -> None:
        """A backward of micro-batches begins. Gradients of the units `by_layer` come in order where they come.

        alone: whether no other rank has gradients. Else those of one micro-batch are summed over ranks before those of
            the next are added, which for units that are not `by_layer` is when its backward has ended.
        """
        self.now, self._by_layer, self._alone = 0, by_layer, alone
        self._ended.clear()
        self._added.clear()
        self._waiting.clear()

    def may_add(self, unit: Unit, position: int) -> bool:
        """Whether the gradient of the micro-batch whose backward runs is the parameter's next."""
        if unit.index in self._by_layer:
            return True
        return self._is_next((unit.index, position), self.now)

    def _is_next(self, key: Key, number: int) -> bool:
        added = self._added.get(key, ()) if self._alone else ()
        return all(before in self._ended or before in added for before in range(number))

    def note(self, unit: Unit, position: int, number: int | None = None) -> None:
        """A gradient of the micro-batch `number`, or the one that runs, is being added. Raises ModelError where one of
        a later micro-batch already was."""
        number = self.now if number is None else number
        added = self._added.setdefault((unit.index, position), [])
        if added and added[-1] > number:
            raise ModelError(
                f"a gradient of {unit.names[position]} came for micro-batch {number} after that of micro-batch "
                f"{added[-1]} had been added: its backward uses it in a way that forward did not show; train this "
                'model with zeroxide.accumulation_order "batches"',
                name=unit.names[position],
            )
        if not added or added[-1] != number:
            added.append(number)

    def end(self, number: int) -> None:
        """The backward of a micro-batch has ended: no gradient of it will come any more."""
        self._ended.add(number)
        for key in list(self._waiting):
            self._add_waiting(key)

    def _take(self, hook: Callable[[Any], None], unit: Unit, position: int, param: Any) -> None:
        if param.grad is None:
            return
        if self.may_add(unit, position):
            self.note(unit, position)
            hook(param)
            if self._waiting:
                self._add_waiting((unit.index, position))
            return
        waiting = self._waiting.setdefault((unit.index, position), {})
        grad, param.grad = param.grad, None
        if self.now in waiting:
            raise ModelError(
                f"two gradients of {unit.names[position]} came for micro-batch {self.now} before that of an earlier "
                'one: train this model with zeroxide.accumulation_order "batches"',
                name=unit.names[position],
            )
        waiting[self.now] = unit, grad

    def _add_waiting(self, key: Key) -> None:
        waiting = self._waiting.get(key, {})
        for number in sorted(waiting):
            if not self._is_next(key, number):
                return
            unit, grad = waiting.pop(number)
            self.note(unit, key[1], number)
            self._reducer.check_open(unit)
            self._reducer.accumulate_unusual(unit, key[1], grad)
        self._waiting.pop(key, None)
