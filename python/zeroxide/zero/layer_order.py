"""Micro-batches that go through a model together, layer by layer, so that a layer's weights are gathered once for all.

Each micro-batch has a thread. It runs forward, and later backward, as if it were alone, except that it hands its turn
on whenever it comes to another layer: a unit that is gathered where its modules run. So every micro-batch has passed
one layer before any enters the next, in forward and, the other way round, in backward. Within a layer micro-batches go
in their order, and so do the gradients of its parameters: sums have the bits of micro-batches one after the other.

Autograd, on the CPU, runs backward in the thread that asks for it, and what a forward made last first. So when it comes
to a layer, it is done with all that forward did from its next layer on, gradients of the parameters there included.

What the hooks know of a pass is known of each micro-batch, and changes hands with the turn. Units stay gathered for as
long as a micro-batch is still inside of them, and until one begins another layer.

In forward any order of turns gives the same results, and so does a model that takes another way for every micro-batch.
In backward the order is that of what all forwards have in common. Where they differ, or a unit may give gradients at
several moments (used more than once, and computed again by a backward within backward), backward is run for one
micro-batch after the other.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from zeroxide.zero.current_pass import Pass, Uses
from zeroxide.zero.hooks import Hooks
from zeroxide.zero.passes import PassState, in_backward
from zeroxide.zero.reduce.in_order import GradientOrder
from zeroxide.zero.turns import Turns
from zeroxide.zero.unit import Unit

__all__ = ["InFlight", "LayerOrder", "RandomNumbers"]


class RandomNumbers(Protocol):
    """What sees to random numbers, which several micro-batches draw in another order than one after the other."""

    def suspend(self, number: int, where: str, *, forward: bool) -> None:
        """A micro-batch stops for others, at the place `where`. May raise what ends it."""

    def resume(self, number: int) -> None:
        """It goes on."""


@dataclass(slots=True, eq=False)
class InFlight:
    """A micro-batch under way."""

    number: int
    current: Pass = field(default_factory=Pass)
    uses: Uses = field(default_factory=Uses)
    large: Any = None
    layers: list[int] = field(default_factory=list)
    """The layers that forward came to, in order, by the identity of a module."""
    place: int = 0
    """In backward, the index of the layer that it is in, or was in last; `len(layers)` before the first."""
    ended: bool = False
    """Whether its forward, or its backward, is over."""
    gone: bool = False
    """Whether its thread has ended."""
    begun: set[int] = field(default_factory=set)
    """Units whose backward has begun."""
    recomputed: set[int] = field(default_factory=set)
    """Units that forward used without gradients, to use them again in backward."""
    layer: str = "the model's first layer"


class LayerOrder:
    """Whose turn it is, and which units stay gathered."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.order = GradientOrder(hooks.reducer)
        self.by_layer = True
        """Whether turns change at layers; else each micro-batch goes through."""
        self.batches: list[InFlight] = []
        self._current: InFlight | None = None
        self._turns = Turns(0)
        self._random: RandomNumbers | None = None
        self._started = False
        self._forward = True
        self._lingering: list[Unit] = []
        self._inside: Counter[int] = Counter()
        """By unit, the micro-batches that are inside of its modules in forward."""
        self._before: tuple[Pass, Uses] = hooks.current, hooks.uses
        self._reductions: Iterator[tuple[int, int, list[Unit]]] = iter(())
        self._next_reduction: tuple[int, int, list[Unit]] | None = None
        self._last: list[Unit] = []

    # What the thread that trains does ---------------------------------------------------------------------------------

    def begin(self, count: int, random: RandomNumbers) -> None:
        """`count` micro-batches begin. Each is to have a thread that calls `enter`."""
        hooks = self.hooks
        if hooks.current.state is PassState.BACKWARD:
            # It failed and was not started by the engine.
            hooks.fail_backward()
        self._before = hooks.current, hooks.uses
        self._turns, self._random = Turns(count), random
        large = hooks.reducer.large
        large.take_uses()
        self.batches = [InFlight(number, large=large.take_uses()) for number in range(count)]
        self._started, self._forward, self.by_layer = False, True, True
        self._lingering.clear()
        self._inside.clear()
        hooks.layers = self

    def run_forward(self) -> None:
        """Runs all forwards to their ends; returns whether backward may go by layers on this rank."""
        self._run()
        hooks = self.hooks
        for unit in self._lingering:
            hooks.gatherer.release(unit)
        self._lingering.clear()
        hooks.current, hooks.uses = self._before
        hooks.thread = threading.get_ident()

    def way(self) -> tuple[list[int], list[int]] | None:
        """The layers that all forwards came to, in order, each by its first unit, and the units that one of them used
        more than once: what decides on the order of backward. None where forwards did not take the same way, or a unit
        may give gradients at several moments: then backward is not to go by layers.
        """
        first = self.batches[0]
        if any(each.layers != first.layers for each in self.batches):
            return None
        if any(
            self.hooks.units[index].held_through_backward or index in each.uses.repeated
            for each in self.batches
            for index in each.recomputed
        ):
            return None
        units = {_layer_of(unit): unit.index for unit in reversed(self.hooks.units)}
        return [units[layer] for layer in first.layers], sorted(self._repeated())

    def _repeated(self) -> set[int]:
        return {index for each in self.batches for index in each.uses.repeated}

    def run_backward(self, *, by_layer: bool, check: Callable[[], None]) -> None:
        """Runs all backwards to their ends. `check` raises what ended one of them."""
        hooks = self.hooks
        self._forward, self.by_layer = False, by_layer
        hooks.reducer.large.starts_at_zero = False
        hooks.begin_backward()
        announced = set(self.batches[0].layers) if by_layer else set()
        repeated = self._repeated()
        in_order = [
            unit
            for unit in hooks.units
            if _layer_of(unit) in announced and not unit.held_through_backward and unit.index not in repeated
        ]
        self.order.begin({unit.index for unit in in_order}, alone=hooks.gatherer.alone)
        self._plan_reductions(in_order)
        for each in self.batches:
            each.ended, each.place = False, len(each.layers)
            each.current = Pass(PassState.BACKWARD, held=hooks.current.held)
        outer = hooks.current
        self._run()
        check()
        hooks.current = outer
        hooks.thread = threading.get_ident()
        if by_layer:
            for each in self.batches:
                self._close(each.number)
        hooks.end_backward()

    # Over ranks, gradients of a unit are reduced once for each micro-batch, in an order that all ranks share: by layer
    # and then by micro-batch, as soon as backward is past the layer; the rest when all backwards have ended.

    def _plan_reductions(self, in_order: list[Unit]) -> None:
        trainable = [unit for unit in self.hooks.units if unit.num_trainable]
        last = {unit.index for unit in in_order}
        self._last = [unit for unit in trainable if unit.index not in last]
        layers = self.batches[0].layers if in_order else []
        at = {layer: [unit for unit in in_order if _layer_of(unit) == layer and unit.num_trainable] for layer in layers}
        # The last moment of a layer in backward is its first in forward.
        places = [place for place in range(len(layers) - 1, -1, -1) if layers.index(layers[place]) == place]
        self._reductions = ((place, each.number, at[layers[place]]) for place in places for each in self.batches)
        self._next_reduction = next(self._reductions, None)

    def _reduce(self) -> None:
        """Reduces what backward is past."""
        while self._next_reduction is not None:
            place, number, units = self._next_reduction
            each = self.batches[number]
            if not each.ended and each.place >= place:
                return
            for unit in units:
                self.hooks.reduction.reduce(unit)
            self._next_reduction = next(self._reductions, None)

    def _close(self, number: int) -> None:
        """The backward of a micro-batch has ended, as have those before it."""
        for unit in self._last:
            self.hooks.reduction.reduce(unit)
        self.order.end(number)

    def _run(self) -> None:
        first = self._next()
        if first is not None:
            self._turns.run(first)

    def cancel(self, numbers: Iterable[int]) -> None:
        """Ends the threads of these micro-batches, one after the other, wherever they stand still."""
        self._turns.cancelled = True
        for number in numbers:
            if not self.batches[number].gone:
                self._turns.run(number)

    def end(self, *, failed: bool) -> None:
        """No micro-batch is under way any more. After a failure everything is released and forgotten."""
        hooks = self.hooks
        backward = hooks.current.state is PassState.BACKWARD or not self._forward
        hooks.layers = self._random = None
        hooks.thread = threading.get_ident()
        self.batches.clear()
        self.order.begin(set())
        if failed:
            hooks.current, hooks.uses = Pass(), Uses()
            if backward:
                hooks.fail_backward()
            else:
                hooks.fail_forward(0)
            self._lingering.clear()
        else:
            hooks.uses = Uses()

    # What the threads do ----------------------------------------------------------------------------------------------

    def enter(self, number: int) -> None:
        """Waits for the first turn of a micro-batch. Raises Cancelled."""
        self._turns.wait(number)
        self._resume(self.batches[number])

    def between(self, number: int) -> None:
        """The forward of a micro-batch is over: waits for its backward. Raises Cancelled."""
        each = self.batches[number]
        self._suspend(each)
        each.ended = True
        self._turns.hand_on(number, self._next())
        self._resume(each)

    def conclude(self, number: int) -> None:
        """The backward of a micro-batch has ended."""
        self.batches[number].ended = True
        self._reduce()
        if not self.by_layer:
            self._close(number)

    def leave(self, number: int, *, failed: bool) -> None:
        """A micro-batch has ended; it was its turn. After a failure no other begins or goes on."""
        each = self.batches[number]
        each.ended = each.gone = True
        self._current = None
        if failed:
            self._turns.cancelled = True
            self._turns.end(None)
            return
        self._turns.end(self._next())

    def begins_pass(self) -> bool:
        """Whether the model is entered for the first time."""
        first, self._started = not self._started, True
        return first

    def come_to(self, unit: Unit) -> None:
        """Forward of a micro-batch comes to a module of the unit. Returns when its turn has come."""
        if in_backward():
            self.come_back_to(unit)
            return
        each = self._current
        assert each is not None, "a forward of somebody else's in the middle of micro-batches"
        if self.hooks.gatherer.training and not torch.is_grad_enabled():
            each.recomputed.add(unit.index)
        if unit.held_through_backward:
            return
        layer = _layer_of(unit)
        if not each.layers or each.layers[-1] != layer:
            each.layers.append(layer)
            each.layer = unit.name
            self._hand_on(each)
        for other in [other for other in self._lingering if other.modules != unit.modules]:
            if not self._inside[other.index]:
                self._lingering.remove(other)
                self.hooks.gatherer.release(other)
        self._inside[unit.index] += 1

    def go_from(self, unit: Unit) -> None:
        """A module of the unit has run for one micro-batch."""
        self._inside[unit.index] -= 1
        if unit not in self._lingering:
            self._lingering.append(unit)

    def come_back_to(self, unit: Unit) -> None:
        """Backward of a micro-batch comes to a module of the unit. Returns when its turn has come."""
        each = self._current
        if each is None or self._forward or unit.held_through_backward:
            return
        layers, layer = each.layers, _layer_of(unit)
        if each.place == len(layers) or layers[each.place] != layer:
            place = next((at for at in range(each.place - 1, -1, -1) if layers[at] == layer), None)
            if place is not None:
                each.place, each.layer = place, unit.name
                if self.by_layer:
                    self._reduce()
                    self._hand_on(each)
        if unit.index not in each.begun:
            each.begun.add(unit.index)
            self.hooks.reducer.expect(unit)

    def _hand_on(self, each: InFlight) -> None:
        to = self._next()
        if to == each.number:
            return
        self._suspend(each)
        self._turns.hand_on(each.number, to)
        self._resume(each)

    def _next(self) -> int | None:
        """Who is to go on: the one that is furthest behind, the first of several. None when all have ended."""
        ready = [each for each in self.batches if not each.ended]
        if not ready:
            return None
        if self._forward:
            return min(ready, key=lambda each: (len(each.layers), each.number)).number
        if not self.by_layer:
            return ready[0].number
        return min(ready, key=lambda each: (-each.place, each.number)).number

    def _suspend(self, each: InFlight) -> None:
        hooks = self.hooks
        each.current, each.uses = hooks.current, hooks.uses
        each.large = hooks.reducer.large.take_uses()
        assert self._random is not None
        self._random.suspend(each.number, each.layer, forward=self._forward)

    def _resume(self, each: InFlight) -> None:
        hooks = self.hooks
        hooks.current, hooks.uses, hooks.thread = each.current, each.uses, threading.get_ident()
        hooks.reducer.large.put_uses(each.large)
        self._current = each
        self.order.now = each.number
        assert self._random is not None
        self._random.resume(each.number)


def _layer_of(unit: Unit) -> int:
    """Units of the same modules are one layer."""
    return id(unit.modules[0])
