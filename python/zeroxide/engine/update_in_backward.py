"""Updates inside of backward: each unit's as soon as its gradients are complete, where a step needs no norm first.

The hooks take it for what gradients are sent to: a unit that is complete is updated, and the end of backward updates
what is left. `step` only ends what has begun. Where a step may clip or be left out, updates can be taken back, and an
ordinary step follows, or none. The hyperparameters are those of the moment in which backward began, and until the step
ends the model is of neither step: what would use or show it is refused.
"""

from __future__ import annotations

import sys

import torch

from zeroxide import _core
from zeroxide.engine.clip_share import ClipShare
from zeroxide.engine.parts import Parts
from zeroxide.errors import ConfigError, ModelError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan
from zeroxide.zero.passes import PassState
from zeroxide.zero.reduce.sent import SentGradients
from zeroxide.zero.unit import Unit

__all__ = ["BackwardUpdates", "connect_updates"]


def connect_updates(parts: Parts) -> None:
    """Has backward update, where the plan says so and there is something to train."""
    if not parts.plan.early.updates or parts.optimizer is None:
        return
    made = BackwardUpdates(parts)
    parts.hooks.before_forward, parts.hooks.before_backward = made.before_forward, made.before_backward
    parts.updater.early = parts.hooks.reduction = parts.reduction = made


def _clip_share(plan: Plan) -> ClipShare:
    less, more = plan.numbers.speculation_traffic
    return ClipShare(less - more, sum(plan.traffic_of_redone()))


class BackwardUpdates:
    """The updates of one engine on its only rank. It stands where other engines have a `GradientReduction`."""

    sent = SentGradients()

    def __init__(self, parts: Parts) -> None:
        self.open = False
        """Whether backward has begun to update and the step that ends it is still to come."""
        self._early = _core.EarlyUpdates(parts.core())
        self._core = parts.core
        self._units = parts.units
        self._hooks = parts.hooks
        self._weights = parts.weights
        self._updater = parts.updater
        self._guard = parts.guard
        self._accumulation = parts.accumulation
        self._speculates = parts.plan.early.speculates
        """Whether an update may be taken back."""
        self._clips = _clip_share(parts.plan) if parts.plan.early.chooses else None
        """What says of each step whether it speculates; None where all do."""
        self._consumes = parts.plan.gradients is Home.CONSUMED
        """Whether there is no room for gradients that wait."""
        self._updated: set[int] = set()
        self._waiting: list[Unit] = []
        """Complete units whose frozen parameters backward may still read."""

    def check_closed(self, call: str) -> None:
        """Raises ModelError for a call that replaces state between a backward that updates and its step."""
        if self.open:
            raise ModelError(
                f"{call}: backward has begun to update the weights (zeroxide.update_in_backward), and the step that "
                "ends it has not been made: call engine.step() first"
            )

    def before_forward(self) -> None:
        """Raises ModelError between a backward that updates and its step."""
        if self.open:
            raise ModelError(
                "forward between a backward that updates (zeroxide.update_in_backward) and its step would see weights "
                "of the step to come: call engine.step() first"
            )

    def before_backward(self) -> None:
        """The outermost backward is about to begin. Raises ModelError and ConfigError where it must not update, and
        then nothing has changed."""
        if self.open:
            raise ModelError(
                "backward: the one before it has begun to update the weights (zeroxide.update_in_backward): call "
                "engine.step() after each backward, or give losses to one backward as their sum"
            )
        last = self._hooks.synchronize and self._accumulation.is_boundary()
        if self._consumes:
            self._check_room(last)
        if not last or not (self._clips is None or self._clips.pays()):
            return
        clipping = self._updater.clipping
        if clipping and not self._speculates:
            raise ConfigError(
                f"gradient clipping is {clipping:g} now, and needs the norm of all gradients before the first update "
                "(zeroxide.update_in_backward): set it back to 0",
                path="gradient_clipping",
            )
        self._guard.before_step()
        self._updated.clear()
        self._waiting.clear()
        self._updater.begin_early(self._early, speculates=self._speculates)
        self.open = True

    def _check_room(self, last: bool) -> None:
        if not last:
            raise ModelError(
                "backward: gradients of this one are to wait for another, and zeroxide.update_in_backward with one "
                "micro-batch a step leaves them no room: give gradient_accumulation_steps in the config, or set "
                'zeroxide.gradients to "host" or "disk"'
            )
        for unit in self._units:
            if unit.index in self._hooks.uses.repeated and not unit.held_through_backward:
                raise ModelError(
                    f"{unit.name} was used twice since the last backward, so that its gradients may be complete only "
                    "when this one ends, and zeroxide.update_in_backward leaves them no room until then: run a forward "
                    'that no backward is for under torch.no_grad(), or set zeroxide.gradients to "host" or "disk"',
                    name=unit.name,
                )

    def send(self, unit: Unit) -> None:
        """The unit's gradients of this backward are complete: from here on none may arrive, and nobody reads it."""
        if not self.open:
            return
        # Backward has come to another unit, and is done with those.
        self._update_waiting()
        if unit.has_frozen:
            self._waiting.append(unit)
        else:
            self._update(unit)

    def reduce(self, unit: Unit) -> None:
        """Gradients are where they belong."""

    def end_backward(self) -> None:
        """Updates what is left."""
        if not self.open:
            return
        self._update_waiting()
        for unit in self._units:
            if unit.num_trainable:
                self._update(unit)

    def abandon(self) -> None:
        """A backward failed. Where it had begun to update, and that cannot be taken back, every later call says so."""
        if not self.open:
            return
        self.open = False
        error = sys.exc_info()[1]
        cause = "backward failed" if error is None else f"backward failed: {error}"
        if not self._early.fail(cause) and self._consumes:
            # The next one begins with nothing in the rooms.
            self._core().clear_gradients()

    def before_step(self, boundary: bool) -> None:
        """A step is about to be made, or a micro-batch to end that is no `boundary`. Raises ModelError where backward
        has updated and that is not its step; StorageError where the backward failed after it had begun to update."""
        if self.open and self._hooks.current.state is PassState.BACKWARD:
            # Started by loss.backward(), whose error the script has caught.
            self._hooks.fail_backward()
        self._core().check_usable()
        if self.open and not boundary:
            raise ModelError(
                "step: backward has begun to update the weights (zeroxide.update_in_backward), and this call would be "
                "no optimizer step: call set_gradient_accumulation_boundary before backward"
            )

    def take_back(self) -> bool:
        """The step is not what backward has made of it, or there is none. Returns whether it had updated anything."""
        return self.open and self._speculates and self._early.take_back()

    def note(self, clips: bool) -> None:
        """Whether a step clips or is left out, which says what is expected of the next ones."""
        if self._clips is not None:
            self._clips.note(clips)

    def after_step(self) -> None:
        """The step has ended what backward began."""
        self.open = False

    def _update_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for unit in waiting:
            self._update(unit)

    def _update(self, unit: Unit) -> None:
        if unit.index in self._updated:
            return
        self._updated.add(unit.index)
        # What autograd has saved of the old values it refuses to use from here on.
        torch._C._increment_version([param for param, own in zip(unit.params, unit.trainable, strict=True) if own])
        unit.note_versions()
        self._early.update(unit.index)
        # Whoever uses it before the step asks the core, which refuses.
        self._weights.drain()
