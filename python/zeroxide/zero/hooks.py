"""When units are gathered and released: hooks on the modules that use them.

Forward: gathered before a unit's module runs, released after it. Backward: gathered when the gradient of the module's
output is known, released when its own gradients have all been accumulated or when the next unit's turn comes: autograd
runs the
nodes of later modules before those of earlier ones, so by then the unit is done. Three cases need more than that:

- A unit that is used by several modules (`held_through_backward`) is held from its first use to the end of backward.
- Within backward, activation checkpointing runs forward again, and backward of the same module follows at once: the
  unit is not released in between.
- A module may hand one of its inputs through. Its gradient says nothing about the module and is not waited for.

Hooks announce uses; they need not see all of them. Whoever hands an empty parameter to an operation gets its unit
(`empty.py`). In backward autograd reads what it has saved, and a read brings a unit back on its own (`stray.py`). Where
that is an exchange between ranks, every module that owns a parameter announces its backward itself, ahead of the read.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves, tree_map

from zeroxide.errors import ModelError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import is_leaf
from zeroxide.zero.gather.gatherer import Gatherer
from zeroxide.zero.gather.stray import StrayReaders
from zeroxide.zero.hook_handle import Hook
from zeroxide.zero.passes import UnitState, in_backward
from zeroxide.zero.reduce.reducer import Reducer
from zeroxide.zero.unit import Unit

__all__ = ["Hooks"]


class Hooks:
    """All hooks of one model."""

    def __init__(self, module: nn.Module, gatherer: Gatherer, units: list[Unit], grad_dtype: torch.dtype) -> None:
        self.gatherer = gatherer
        self.units = units
        self.reducer = Reducer(
            gatherer.core,
            units,
            self.begin_backward,
            self._gradients_complete,
            self._note_repeated,
            lambda: gatherer.training,
            gatherer.exchange.closed,
            grad_dtype,
        )
        self.exchange = gatherer.exchange
        self.moves = not gatherer.params_always_full and gatherer.home is not Home.HOST
        """Whether the memory under parameters is another unit's when they are not in use."""
        self.forward_depth = 0
        self.accumulators: list[Any] = []
        """Nodes that autograd must not make itself in this pass, since it would make them for an empty parameter."""
        self.pending = False
        """Whether a forward with gradients has run whose backward has not ended."""
        self.before_training: Callable[[], None] | None = None
        """Called before every forward with gradients."""
        self.synchronize = True
        """Whether gradients are exchanged at the end of their backward, or pile up on this rank."""
        self.held: list[Unit] = []
        self.lingering: Unit | None = None
        """A unit of several modules, one of which has run: in use until another unit's turn comes."""
        self.marked = {
            unit.index
            for unit in units
            if unit.num_trainable
            and not unit.held_through_backward
            and len(unit.modules) == 1
            and is_leaf(unit.modules[0])
        }
        """Units of leaf modules."""
        # Those whose turn in backward has come, and whose gradients have not been sent.
        self.leaves: list[Unit] = []
        # Modules run so far in this pass; a unit whose module runs twice gets gradients twice.
        self.ran: set[tuple[int, int]] = set()
        self.repeated: set[int] = set()
        self.backward_ended = False
        self.closed = False
        self.thread = threading.get_ident()
        """Which runs the passes. Weights come and go for it alone."""
        self.uses_apart = 0
        """Operations outside of passes that are under way."""
        self.inside_backward = False
        self.entered: list[set[Origin]] = []
        self.handles: list[Any] = []
        # Each goes before what is there, so the last one registered runs first: units of one module in their order.
        for unit in reversed(units):
            for owner in unit.modules:
                self._add(owner.register_forward_pre_hook(Hook(self._before, unit), prepend=True, with_kwargs=True))
        for unit in units:
            for owner in unit.modules:
                self._add(owner.register_forward_hook(Hook(self._after, unit), always_call=True))
        for unit in units if self.moves and not gatherer.stays else ():
            for owner in {id(each): each for owners in unit.owners for each in owners}.values():
                if owner not in unit.modules:
                    self._add(owner.register_forward_hook(Hook(self._after_part, unit)))
        # Prepended last, so that a pass begins before the first unit of it is gathered.
        self._add(module.register_forward_pre_hook(Hook(self._enter), prepend=True))
        self._add(module.register_forward_hook(Hook(self._leave), always_call=True))
        self.strays = StrayReaders(gatherer.core, self) if self.moves and not gatherer.stays else None

    def _add(self, handle: Any) -> None:
        self.handles.append(handle)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.forward_depth += 1
        self.thread = threading.get_ident()
        if not in_backward():
            self.gatherer.core.watch_readers()
            if self.inside_backward:
                # A backward that failed and was not started by the engine.
                self.fail_backward()
            self.entered.clear()
            training = torch.is_grad_enabled()
            if training and self.before_training is not None:
                self.before_training()
            if self.backward_ended and training:
                # Several forwards before one backward count together.
                self.ran.clear()
                self.repeated.clear()
                self.backward_ended = False
            self.pending |= training
            self.gatherer.start_pass(training)

    def in_pass(self) -> bool:
        """Whether a forward or backward of the model, or of a part of it, is under way on this thread."""
        if in_backward():
            return True
        return (self.forward_depth > 0 or bool(self.entered)) and self.thread == threading.get_ident()

    def is_passing(self) -> bool:
        """As `in_pass`, asked by a thread that may have no part in it."""
        return self.forward_depth > 0 or bool(self.entered) or self.inside_backward

    @contextmanager
    def apart(self) -> Iterator[None]:
        """An operation outside of a pass: what it reads is brought, or it raises ModelError."""
        self.uses_apart += 1
        try:
            yield
            if self.moves:
                self.gatherer.core.watch_readers()
        finally:
            self.uses_apart -= 1

    def use(self, units: Sequence[Unit]) -> None:
        """Gathers units that an operation needs."""
        if in_backward():
            self.begin_backward()
        self.gatherer.use(units)

    def end_use(self, recorded: Sequence[torch.Tensor]) -> None:
        """Ends `use` outside of a pass, whose results are copies. Backward of what autograd has `recorded` is a pass,
        which shows what it may have saved, and a read brings that.
        """
        _on_gradient(recorded, self.begin_backward, self.gatherer.params_always_full)
        guests = list(self.gatherer.guests)
        self.gatherer.release_guests()
        for unit in guests if not self.gatherer.params_always_full else ():
            unit.hide()

    def _before(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.entered.append({_origin(tensor) for tensor in _tensors((args, kwargs))})
        if in_backward():
            self._hold(unit)
            return
        self.note_run(unit, module)
        if self.lingering is not unit:
            self._end_lingering()
        self.gatherer.gather(unit)

    def note_run(self, unit: Unit, module: nn.Module) -> None:
        """Notes that a module of the unit runs in forward, for the first time in this pass or again."""
        if not self.gatherer.training:
            return
        key = (unit.index, id(module))
        if key in self.ran:
            self.repeated.add(unit.index)
        self.ran.add(key)

    def _note_repeated(self, unit: Unit) -> None:
        self.repeated.add(unit.index)

    def _after(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> Any:
        # Empty where recomputation stopped early inside the module and the next pass began.
        given = self.entered.pop() if self.entered else set()
        if unit.held_through_backward:
            return None
        kept = self._kept([unit], output) if self.moves else None
        output = output if kept is None else kept
        own = [tensor for tensor in _tensors(output) if _origin(tensor) not in given]
        _on_gradient(own, partial(self._before_backward, unit), self.gatherer.params_always_full)
        if not in_backward():
            if len(unit.modules) > 1:
                self.lingering = unit
            else:
                self.gatherer.release(unit)
        return kept

    def _end_lingering(self) -> None:
        if self.lingering is not None:
            self.gatherer.release(self.lingering)
            self.lingering = None

    def _after_part(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        _on_gradient(_tensors(output), partial(self._before_part, unit), self.gatherer.params_always_full)

    def _kept(self, units: Sequence[Unit], output: Any) -> Any:
        """The output with copies in place of views of weights, whose memory goes; None where there are none."""
        found = {id(tensor) for tensor in _tensors(output) if any(unit.contains(tensor) for unit in units)}
        if not found:
            return None
        return _replaced(output, lambda tensor: tensor.clone() if id(tensor) in found else tensor)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        try:
            return None if in_backward() else self._end_forward(output)
        finally:
            # Last: until then no other thread may use a weight.
            self.forward_depth = max(0, self.forward_depth - 1)

    def _end_forward(self, output: Any) -> Any:
        kept = self._kept(self.units, output) if self.moves else None
        self._end_lingering()
        if torch.is_grad_enabled():
            _on_gradient(
                _tensors(output if kept is None else kept), self.begin_backward, self.gatherer.params_always_full
            )
            self.gatherer.release_guests()
        else:
            self.gatherer.release_all(hide=not self.pending)
        if self.moves:
            self.gatherer.core.watch_readers()
        return kept

    def begin_backward(self) -> None:
        """The gradient of the model's own output is known, or about to be: the outermost backward begins."""
        if self.inside_backward:
            return
        if self.closed:
            raise ModelError("backward after the engine was destroyed: its weights and gradients have gone with it")
        self.inside_backward = True
        self.thread = threading.get_ident()
        self.reducer.expect_all()
        self.gatherer.begin_backward()
        for unit in self.units:
            if unit.held_through_backward:
                self.gatherer.gather(unit)
        if in_backward():
            Variable._execution_engine.queue_callback(self.end_backward)

    def _before_backward(self, unit: Unit) -> None:
        if self._is_inside_forward(unit):
            return
        if self.marked:
            self._end_leaves(unit)
        if unit.index in self.repeated or not self.reducer.is_complete(unit):
            self._hold(unit)

    def _before_part(self, unit: Unit) -> None:
        """A part of the unit's modules comes to its backward, announced by the unit's own modules or not."""
        if self._is_inside_forward(unit):
            return
        self.begin_backward()
        if unit not in self.held and not self.reducer.is_complete(unit):
            self._hold(unit)

    def _is_inside_forward(self, unit: Unit) -> bool:
        """Whether forward itself asks for gradients. Nothing is accumulated then; what it reads is brought."""
        if self.inside_backward or not self.forward_depth:
            return False
        if not self.gatherer.stays:
            for each in self.units:
                each.show()
            self.gatherer.use([unit])
        return True

    def _hold(self, unit: Unit) -> None:
        """Gathers the unit whose turn it is in backward, and releases the ones before it.

        Units of the same modules take their turn together.
        """
        if unit.held_through_backward:
            self.gatherer.gather(unit)
            return
        if self.held and self.held[0].modules != unit.modules:
            for before in self.held:
                self.gatherer.release(before)
            self.held.clear()
        if unit not in self.held:
            self.held.append(unit)
        self.gatherer.gather(unit)

    def _end_leaves(self, unit: Unit) -> None:
        """Sends the leaf modules whose turn in backward was before the unit's, though gradients of theirs are missing.

        What a leaf module uses depends on the data. A rank that used all of it must not wait until backward ends for
        one that did not, while that one waits for weights.
        """
        for leaf in [each for each in self.leaves if each.modules != unit.modules]:
            self.leaves.remove(leaf)
            if self.synchronize:
                self.exchange.send(leaf)
        if unit.index in self.marked - self.repeated and unit not in self.leaves:
            self.leaves.append(unit)

    def _gradients_complete(self, unit: Unit) -> None:
        # A module that ran twice has its backward twice, and may get gradients twice.
        if unit.held_through_backward or unit.index in self.repeated:
            return
        # What is frozen may still be needed for the gradient of the unit's input.
        if not unit.has_frozen:
            self.gatherer.release(unit)
        if self.synchronize:
            self.exchange.send(unit)

    def end_backward(self) -> None:
        """Releases every unit and ends the exchange of gradients. Called by autograd at the end of a backward."""
        if self.inside_backward:
            self._leave_backward()
            if self.moves:
                self.gatherer.core.watch_readers()
            if self.synchronize:
                try:
                    self.exchange.end_backward()
                except BaseException:
                    self.exchange.abandon()
                    raise

    def after_step(self) -> None:
        """Weights have changed, or are about to while a step is under way: a graph from before must not be used."""
        self.reducer.large.starts_at_zero = True
        torch._C._increment_version(self.reducer.params)
        for unit in self.units:
            if unit.state is UnitState.GATHERED:
                unit.note_versions()
        if self.moves and self.gatherer.stays and any(unit.has_readers() for unit in self.units):
            # Somebody may read what is being updated.
            self.gatherer.core.finish()

    def fail_forward(self, depth: int) -> None:
        """Goes back to the depth at which a forward began that failed. Of an interrupt torch tells no hook."""
        self.forward_depth = depth
        if depth == 0 and not in_backward():
            self.entered.clear()
            self._end_lingering()
            self.gatherer.release_all()

    def fail_backward(self) -> None:
        """Releases every unit, after a backward that failed. With several ranks there is no going on."""
        try:
            self._leave_backward()
        finally:
            self.exchange.abandon()

    def _leave_backward(self) -> None:
        try:
            # Readers are served until nobody's weights are looked at any more.
            self.gatherer.release_all()
        finally:
            self.inside_backward = False
            self.backward_ended = True
            self.pending = False
            self.forward_depth = 0
            self.accumulators.clear()
            self.held.clear()
            self.lingering = None
            self.leaves.clear()
            self.reducer.large.end_backward()

    def close(self) -> None:
        """Removes all hooks."""
        self.closed = True
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.accumulators.clear()
        if self.strays is not None:
            self.strays.close()
        self.reducer.close()


Origin = tuple[Any, int]


def _origin(tensor: torch.Tensor) -> Origin:
    """What made the tensor: an operation in place makes it something new, a module that hands it through does not."""
    return (tensor.grad_fn, tensor.output_nr) if tensor.grad_fn is not None else (id(tensor), 0)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers, dataclasses among them."""
    if isinstance(tree, torch.Tensor):
        yield tree
        return
    # What nearly every module takes and gives, without the cost of looking for other kinds of containers.
    if tree is None or type(tree) is bool:
        return
    if type(tree) is tuple or type(tree) is list:
        for each in tree:
            yield from _tensors(each)
        return
    if type(tree) is dict:
        for each in tree.values():
            yield from _tensors(each)
        return
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def _replaced(tree: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tree with `act` done to every tensor that `_tensors` finds in it."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = {field.name: _replaced(getattr(tree, field.name), act) for field in dataclasses.fields(tree)}
        for name, value in changed.items():
            if value is not getattr(tree, name):
                setattr(tree, name, value)
        return tree
    return tree_map(lambda leaf: act(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def _on_gradient(tensors: Iterable[torch.Tensor], act: Callable[[], None], params_always_full: bool) -> None:
    """Runs `act` when the gradient of any of the tensors is known."""

    def hook(grad: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            if torch._C._functorch.peek_interpreter_stack() is not None:
                if params_always_full:
                    # A transform of torch.func accumulates no gradient, and needs nothing brought.
                    return
                raise ModelError(
                    "torch.func over an engine's module at stage 3: its transforms run beside the passes that weights "
                    "are brought for; use stages 0 to 2, or torch.autograd"
                )
            raise ModelError(
                "backward with create_graph=True: a graph of the backward would refer to weights that are gone when it "
                "is used; double backward is not supported"
            )
        act()

    for tensor in tensors:
        # A leaf is nothing that the module has made; a hook on it would stay for ever.
        if tensor.grad_fn is not None:
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]
