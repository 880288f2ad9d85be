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

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import Variable

from zeroxide.errors import ModelError
from zeroxide.plan.plan import is_leaf
from zeroxide.zero.current_pass import Pass, Uses
from zeroxide.zero.gather.gatherer import Gatherer
from zeroxide.zero.gather.stray import StrayReaders
from zeroxide.zero.gradient_hooks import on_gradient
from zeroxide.zero.hook_handle import Hook
from zeroxide.zero.nested import given, handed_through, replaced, tensors_in
from zeroxide.zero.passes import PassState, UnitState, UsesState, in_backward
from zeroxide.zero.reduce.gradient_reduction import GradientReduction
from zeroxide.zero.reduce.offload import GradientOffload
from zeroxide.zero.reduce.reducer import Reducer
from zeroxide.zero.reduce.unused_rows import UnusedRows
from zeroxide.zero.saved_tensors import SavedTensors
from zeroxide.zero.stowed_view import ActivationStore
from zeroxide.zero.unit import Unit

if TYPE_CHECKING:
    from zeroxide.zero.layer_order import LayerOrder

__all__ = ["Hooks"]


class Hooks:
    """All hooks of one model."""

    def __init__(
        self,
        module: nn.Module,
        gatherer: Gatherer,
        reduction: GradientReduction,
        units: list[Unit],
        grad_dtype: torch.dtype,
        grad_offload: GradientOffload | None = None,
        activations: ActivationStore | None = None,
    ) -> None:
        self.gatherer = gatherer
        self.units = units
        self.reduction = reduction
        self.moves = not gatherer.params_always_full and gatherer.moves
        """Whether the memory under parameters is another unit's when they are not in use."""
        self.serves = self.moves and grad_offload is None
        """Whether a read of weights that are not there is noticed, and waits until they are."""
        self.saved: SavedTensors | None = None
        if grad_offload is not None and (self.moves or activations is not None):
            self.saved = SavedTensors(units, self.use if self.moves else None, activations)
        elif activations is not None:
            # A read of a weight in host memory is served, whoever saved it.
            self.saved = SavedTensors((), None, activations)
        self.marked = {unit.index for unit in units if unit.num_trainable and _is_of_leaf(unit)}
        """Units of leaf modules."""
        self.spans = [unit for unit in units if unit.held_through_backward]
        """Units that are held from their first use to the end of backward."""
        self.current = Pass()
        """The pass under way, and what is known of it."""
        self.uses = Uses()
        """What the backward that is to come must know of the forwards before it."""
        self.layers: LayerOrder | None = None
        """Several micro-batches on their way through the model, each with a thread, a pass and uses of its own."""
        self.thread = threading.get_ident()
        """Which runs the passes. Weights come and go for it alone."""
        self.before_training: Callable[[], None] | None = None
        """Called before every forward with gradients."""
        self.before_forward: Callable[[], None] | None = None
        """Called before every forward of the whole model outside of backward."""
        self.before_backward: Callable[[], None] | None = None
        """Called before the outermost backward begins."""
        self.on_backward: tuple[Callable[[], None], Callable[[], None]] | None = None
        """Called when the outermost backward begins, and when it has ended with all that it exchanges."""
        self.synchronize = True
        """Whether gradients are exchanged at the end of their backward, or pile up on this rank."""
        self.uses_apart = 0
        """Operations outside of passes that are under way."""
        self.closed = False
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
        self.reducer = Reducer(
            gatherer.core,
            units,
            self.begin_backward,
            self._gradients_complete,
            self._note_repeated,
            lambda: gatherer.training,
            grad_dtype,
            grad_offload,
        )
        self.unused_rows = UnusedRows(units) if gatherer.alone else None
        """Over several ranks every block of rows is used in every pass."""
        self.strays = StrayReaders(gatherer.core, self) if self.serves and not gatherer.stays else None

    def _add(self, handle: Any) -> None:
        self.handles.append(handle)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.thread = threading.get_ident()
        if in_backward():
            self.current.depth += 1
            return
        if self.reducer.grad_offload is not None:
            self.reducer.grad_offload.transfers.refuse_capture()
        self.gatherer.core.watch_readers()
        if self.current.state is PassState.BACKWARD:
            # It failed and was not started by the engine.
            self.fail_backward()
        if self.before_forward is not None:
            self.before_forward()
        if self.current.state is PassState.IDLE:
            self.current.become(PassState.FORWARD)
        self.current.depth += 1
        self.current.inputs.clear()
        training = torch.is_grad_enabled()
        if training:
            if self.before_training is not None:
                self.before_training()
            if self.uses.state is UsesState.ENDED:
                self.uses = Uses()
            self.uses.state = UsesState.PENDING
            self._begin_saving()
        if self.layers is None or self.layers.begins_pass():
            self.gatherer.start_pass(training)

    def in_pass(self) -> bool:
        """Whether a forward or backward of the model, or of a part of it, is under way on this thread."""
        if in_backward():
            return True
        current = self.current
        return (current.depth > 0 or bool(current.inputs)) and self.thread == threading.get_ident()

    def lacks(self, unit: Unit) -> bool:
        """Whether a pass is under way on this thread to which the unit has not been brought."""
        current = self.current
        if in_backward():
            if current.state is not PassState.BACKWARD:
                return True
        elif not (current.depth or current.inputs) or self.thread != threading.get_ident():
            return False
        return unit.state is not UnitState.GATHERED or unit.index not in self.gatherer.used

    def is_passing(self) -> bool:
        """As `in_pass`, asked by a thread that may have no part in it."""
        return self.current.under_way

    @contextmanager
    def apart(self) -> Iterator[None]:
        """An operation outside of a pass: what it reads is brought, or it raises ModelError."""
        self.uses_apart += 1
        self._begin_saving()
        try:
            yield
            if self.serves:
                self.gatherer.core.watch_readers()
        finally:
            self.uses_apart -= 1
            self._end_saving()

    def use(self, units: Sequence[Unit]) -> None:
        """Gathers units that an operation needs."""
        if in_backward() and not self._asks_in_forward():
            self.begin_backward()
        self.gatherer.use(units)

    def end_use(self, recorded: Sequence[torch.Tensor]) -> None:
        """Ends `use` outside of a pass, whose results are copies. Backward of what autograd has `recorded` is a pass,
        which shows what it may have saved, and a read brings that.
        """
        on_gradient(recorded, self.begin_backward, self.gatherer.params_always_full)
        guests = list(self.gatherer.guests)
        self.gatherer.release_guests()
        for unit in guests if not self.gatherer.params_always_full else ():
            unit.hide()

    def _before(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.layers is not None:
            self.layers.come_to(unit)
        current = self.current
        self._begin_saving()
        current.inputs.append(given(tensors_in(*args, *kwargs.values())))
        if in_backward():
            self._hold(unit)
            return
        if self.gatherer.training:
            self.uses.note(unit, module)
        if current.lingering is not unit:
            self._end_lingering()
        self.gatherer.gather(unit)

    def _note_repeated(self, unit: Unit) -> None:
        self.uses.repeated.add(unit.index)

    def _after(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> Any:
        inputs = self.current.inputs
        # Empty where recomputation stopped early inside the module and the next pass began.
        before = inputs.pop() if inputs else {}
        self._end_saving()
        if unit.held_through_backward:
            return None
        kept = None
        if self.moves and (kept := self._kept([unit], output)) is not None:
            output = kept
        own = [tensor for tensor in tensors_in(output) if not handed_through(tensor, before)]
        on_gradient(own, partial(self._before_backward, unit), self.gatherer.params_always_full)
        if not in_backward():
            if self.layers is not None:
                self.layers.go_from(unit)
            elif len(unit.modules) > 1:
                self.current.lingering = unit
            else:
                self.gatherer.release(unit)
        return kept

    def _end_lingering(self) -> None:
        unit = self.current.lingering
        if unit is not None:
            self.gatherer.release(unit)
            self.current.lingering = None

    def _after_part(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        on_gradient(tensors_in(output), partial(self._before_part, unit), self.gatherer.params_always_full)

    def _kept(self, units: Sequence[Unit], output: Any) -> Any:
        """The output with copies in place of views of weights, whose memory goes; None where there are none."""
        found = {id(tensor) for tensor in tensors_in(output) if any(unit.contains(tensor) for unit in units)}
        if not found:
            return None
        return replaced(output, lambda tensor: tensor.clone() if id(tensor) in found else tensor)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        try:
            return None if in_backward() else self._end_forward(output)
        finally:
            # Last: until then no other thread may use a weight.
            current = self.current
            current.depth = max(0, current.depth - 1)
            self._end_saving()
            if current.depth == 0 and current.state is PassState.FORWARD:
                self.current = Pass()

    def _begin_saving(self) -> None:
        if self.saved is not None and not in_backward():
            self.saved.begin()

    def _end_saving(self) -> None:
        """Unless a module is under way, or an operation outside of one."""
        current = self.current
        if self.saved is not None and not (current.depth or current.inputs or self.uses_apart or in_backward()):
            self.saved.end()

    def _end_forward(self, output: Any) -> Any:
        kept = self._kept(self.units, output) if self.moves else None
        self._end_lingering()
        if torch.is_grad_enabled():
            on_gradient(
                tensors_in(output if kept is None else kept), self.begin_backward, self.gatherer.params_always_full
            )
            self.gatherer.release_guests()
        else:
            self.gatherer.release_all(hide=self.uses.state is not UsesState.PENDING)
        if self.serves:
            self.gatherer.core.watch_readers()
        return kept

    def begin_backward(self) -> None:
        """The gradient of the model's own output is known, or about to be: the outermost backward begins."""
        if self.current.state is PassState.BACKWARD:
            return
        if self.closed:
            raise ModelError("backward after the engine was destroyed: its weights and gradients have gone with it")
        if self.before_backward is not None:
            self.before_backward()
        if self.on_backward is not None:
            self.on_backward[0]()
        self.current.become(PassState.BACKWARD)
        # Backward on a device runs on a thread of autograd's, and what follows it on the caller's again.
        if self.reducer.grad_offload is None or not in_backward():
            self.thread = threading.get_ident()
        self.reducer.expect_all()
        self.gatherer.begin_backward()
        for unit in self.spans:
            self.gatherer.gather(unit)
        if in_backward():
            Variable._execution_engine.queue_callback(self.end_backward)

    def _before_backward(self, unit: Unit) -> None:
        if self._is_inside_forward(unit):
            return
        if self.layers is not None:
            self.layers.come_back_to(unit)
        elif self.marked:
            self._end_leaves(unit)
        if unit.index in self.uses.repeated or not self.reducer.is_complete(unit):
            self._hold(unit)

    def _before_part(self, unit: Unit) -> None:
        """A part of the unit's modules comes to its backward, announced by the unit's own modules or not."""
        if self._is_inside_forward(unit):
            return
        self.begin_backward()
        if self.layers is not None:
            self.layers.come_back_to(unit)
        if unit not in self.current.held and not self.reducer.is_complete(unit):
            self._hold(unit)

    def _is_inside_forward(self, unit: Unit) -> bool:
        """Whether forward itself asks for gradients. Nothing is accumulated then; what it reads is brought."""
        if not self._asks_in_forward():
            return False
        if not self.gatherer.stays:
            self.gatherer.show_what_may_be_read()
            self.gatherer.use([unit])
        return True

    def _asks_in_forward(self) -> bool:
        return self.current.state is not PassState.BACKWARD and self.current.depth > 0

    def _hold(self, unit: Unit) -> None:
        """Gathers the unit whose turn it is in backward, and releases the ones before it.

        Units of the same modules take their turn together.
        """
        if unit.held_through_backward:
            self.gatherer.gather(unit)
            return
        held = self.current.held
        if held and held[0].modules != unit.modules:
            for before in held:
                self.gatherer.release(before)
            held.clear()
        if unit not in held:
            held.append(unit)
        self.gatherer.gather(unit)

    def _end_leaves(self, unit: Unit) -> None:
        """Sends the leaf modules whose turn in backward was before the unit's, though gradients of theirs are missing.

        What a leaf module uses depends on the data. A rank that used all of it must not wait until backward ends for
        one that did not, while that one waits for weights.
        """
        leaves = self.current.leaves
        for leaf in [each for each in leaves if each.modules != unit.modules]:
            leaves.remove(leaf)
            if self.synchronize:
                self.reduction.send(leaf)
        if unit.index in self.marked - self.uses.repeated and unit not in leaves:
            leaves.append(unit)

    def _gradients_complete(self, unit: Unit) -> None:
        # A module that ran twice has its backward twice, and may get gradients twice.
        if unit.held_through_backward or unit.index in self.uses.repeated:
            return
        if self.layers is not None:
            # The next micro-batch comes to it.
            return
        # What is frozen may still be needed for the gradient of the unit's input.
        if not unit.has_frozen:
            self.gatherer.release(unit)
        if self.synchronize:
            self.reduction.send(unit)

    def end_backward(self) -> None:
        """Releases every unit and ends the exchange of gradients. Called by autograd at the end of a backward."""
        if self.current.state is PassState.BACKWARD:
            self._leave_backward()
            if self.serves:
                self.gatherer.core.watch_readers()
            self.reducer.drain()
            if self.unused_rows is not None:
                self.unused_rows.end_backward(self.gatherer.core)
            if self.synchronize and self.layers is None:
                try:
                    self.reduction.end_backward()
                except BaseException:
                    self.reduction.abandon()
                    raise
            if self.on_backward is not None:
                self.on_backward[1]()

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
        self.current.depth = depth
        if depth == 0 and not in_backward():
            self._end_lingering()
            if self.current.state is not PassState.BACKWARD:
                self.current = Pass()
            self.current.inputs.clear()
            self._end_saving()
            self.gatherer.release_all()

    def fail_backward(self) -> None:
        """Releases every unit, after a backward that failed. With several ranks there is no going on."""
        try:
            self._leave_backward()
        finally:
            self.reduction.abandon()

    def _leave_backward(self) -> None:
        try:
            # Readers are served until nobody's weights are looked at any more.
            self.gatherer.release_all()
        finally:
            # Modules under way go on, where backward ran inside of one.
            self.current = Pass(inputs=self.current.inputs)
            self.uses.state = UsesState.ENDED
            self.uses.accumulators.clear()
            self.reducer.end_backward()
            if self.saved is not None:
                self.saved.end_backward()

    def close(self) -> None:
        """Removes all hooks."""
        self.closed = True
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.uses.accumulators.clear()
        if self.strays is not None:
            self.strays.close()
        self.reducer.close()


def _is_of_leaf(unit: Unit) -> bool:
    return not unit.held_through_backward and len(unit.modules) == 1 and is_leaf(unit.modules[0])
