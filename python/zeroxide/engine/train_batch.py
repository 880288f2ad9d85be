"""All micro-batches of one optimizer step: one after the other, or layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zeroxide.device.placement import in_host
from zeroxide.distributed import IDLE
from zeroxide.engine.micro_batches import Feed, loss_of
from zeroxide.engine.parts import Parts
from zeroxide.engine.random_numbers import NoneDrawn, OwnNumbers, draw_seeds, of_seed
from zeroxide.engine.thread_settings import in_same_settings
from zeroxide.errors import ModelError
from zeroxide.precision.policy import cast_inputs, forward_context
from zeroxide.zero.layer_order import LayerOrder
from zeroxide.zero.turns import Cancelled
from zeroxide.zero.untraced import leave_untraced

__all__ = ["LAYERS", "WindowTrainer"]

LAYERS = "layers"

LossFn = Callable[[Any, Any], torch.Tensor]


class WindowTrainer:
    """Accumulates the gradients of all micro-batches of an optimizer step, in the order that the config asks for.

    forward, backward, step: the engine's own, for one micro-batch.
    """

    def __init__(
        self,
        parts: Parts,
        forward: Callable[..., Any],
        backward: Callable[[torch.Tensor], torch.Tensor],
        step: Callable[[], None],
    ) -> None:
        self._parts = parts
        self._one = forward, backward, step
        self._feed = Feed(parts.dataloader, parts.ranks, parts.watch)
        self._seeded = parts.config.zeroxide.micro_batch_seeds
        self._layers: LayerOrder | None = None
        self._open = False
        if parts.config.zeroxide.accumulation_order == LAYERS:
            self._layers = LayerOrder(parts.hooks)
            before = parts.hooks.before_training
            parts.hooks.before_training = partial(self._check_forward, before)

    @property
    def by_layer(self) -> bool:
        """Whether micro-batches go through the model layer by layer."""
        return self._layers is not None

    def _check_forward(self, before: Callable[[], None] | None) -> None:
        if not self._open:
            self.check_by_hand("a forward with gradients")
        if before is not None:
            before()

    def check_by_hand(self, call: str) -> None:
        """Raises ModelError where micro-batches go through the model together."""
        if self.by_layer:
            raise ModelError(
                f'{call}: zeroxide.accumulation_order is "layers", with which all micro-batches of a step go through '
                "the model together: call engine.train_batch(data_iter), or evaluate under torch.no_grad()"
            )

    def accumulate(self, data_iter: Any, loss_fn: LossFn | None) -> list[torch.Tensor]:
        """Forward and backward of every micro-batch of a step; the losses, detached. `step` is to follow.

        After an error gradients are forgotten, and counts are what they were before the call.
        """
        self._check_between()
        parts = self._parts
        batches = self._feed.pull(data_iter, parts.accumulation.steps)
        seeds = draw_seeds(len(batches)) if self._seeded else None
        micro_steps = parts.counters.micro_steps
        self._open = True
        try:
            if self._layers is None:
                return self._one_by_one(batches, loss_fn, seeds)
            losses = self._together(self._layers, batches, loss_fn, seeds)
            parts.counters.micro_steps += len(batches) - 1
            return losses
        except BaseException:
            parts.counters.micro_steps = micro_steps
            if parts.core.alive:
                parts.core().clear_gradients()
            raise
        finally:
            self._open = False

    def end(self, make_step: Callable[[dict[str, Any]], None]) -> None:
        """Makes the step. One that is refused before it is counted leaves nothing of its micro-batches."""
        parts = self._parts
        try:
            make_step({})
        except BaseException:
            left = parts.accumulation.inside_window()
            if left and parts.core.alive:
                parts.counters.micro_steps -= left
                parts.core().clear_gradients()
            raise

    def _check_between(self) -> None:
        accumulation, problem = self._parts.accumulation, None
        if accumulation.boundary is not None:
            problem = "the boundary was set from outside: set_gradient_accumulation_boundary(None) takes that back"
        elif accumulation.inside_window():
            problem = f"{accumulation.inside_window()} of {accumulation.steps} micro-batches were made by hand"
        elif not self._parts.hooks.synchronize:
            problem = "it is called inside engine.no_sync()"
        if problem is not None:
            raise ModelError(f"train_batch makes an optimizer step of its own: {problem}")

    def mean(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Their mean over all ranks that share the data: fp32 of shape (). Every rank calls it."""
        mean = torch.stack([loss.float().reshape(()) for loss in losses]).mean()
        ranks = self._parts.ranks
        if ranks.alone:
            return mean
        with self._parts.watch.waiting("the mean loss", "train_batch"):
            rows = ranks.gather_rows(in_host(mean), "the mean loss")
        return rows.mean().to(mean.device)

    # One after the other ----------------------------------------------------------------------------------------------

    def _one_by_one(self, batches: list[Any], loss_fn: LossFn | None, seeds: list[int] | None) -> list[torch.Tensor]:
        losses = []
        for number, batch in enumerate(batches):
            if seeds is None:
                losses.append(self._pass(batch, loss_fn))
            else:
                with of_seed(seeds[number], self._parts.device):
                    losses.append(self._pass(batch, loss_fn))
            if number + 1 < len(batches) and self._parts.config.batch.managed_gradient_accumulation:
                self._one[2]()
        return losses

    def _pass(self, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
        forward, backward, _ = self._one
        loss = loss_of(forward, batch, loss_fn)
        backward(loss)
        return loss.detach()

    # Layer by layer ---------------------------------------------------------------------------------------------------

    def _together(
        self, layers: LayerOrder, batches: list[Any], loss_fn: LossFn | None, seeds: list[int] | None
    ) -> list[torch.Tensor]:
        parts = self._parts
        parts.core()
        leave_untraced()
        random = NoneDrawn() if seeds is None else OwnNumbers(seeds)
        layers.begin(len(batches), random)
        passes = _Passes(parts, layers, batches, loss_fn)
        failed = True
        try:
            with parts.health.doing("micro-batches ran layer by layer"):
                losses = passes.run()
            failed = False
        finally:
            if failed:
                passes.cancel()
            random.end()
            layers.end(failed=failed)
            parts.watch.doing = IDLE
        for loss in losses:
            parts.accumulation.count_backward()
            parts.observers.note_loss(loss / len(losses) if len(losses) > 1 else loss)
        return losses


class _Passes:
    """Forward and backward of micro-batches under way, each in a thread."""

    def __init__(self, parts: Parts, layers: LayerOrder, batches: list[Any], loss_fn: LossFn | None) -> None:
        self._parts = parts
        self._layers = layers
        self._batches: list[Any] = list(batches)
        self._loss_fn = loss_fn
        self._losses: list[torch.Tensor | None] = [None] * len(batches)
        self._error: tuple[int, BaseException] | None = None
        work = in_same_settings(self._work)
        self._threads = [
            threading.Thread(target=work, args=(number,), name=f"zeroxide-micro-batch-{number}", daemon=True)
            for number in range(len(batches))
        ]

    def run(self) -> list[torch.Tensor]:
        """All forwards, then all backwards; the losses, detached. Raises what ended a micro-batch."""
        parts, layers, accumulation = self._parts, self._layers, self._parts.accumulation
        for thread in self._threads:
            thread.start()
        start = parts.timers.now()
        parts.watch.doing = ("forward", None, None, None)
        layers.run_forward()
        self._check()
        parts.timers.add("fwd", start)
        parts.watch.doing = ("backward", None, None, None)
        by_layer = self._is_same_way(layers.way())
        accumulation.take_as_divided()
        try:
            layers.run_backward(by_layer=by_layer, check=self._check)
        finally:
            accumulation.divide_gradients()
        for thread in self._threads:
            thread.join()
        return [loss for loss in self._losses if loss is not None]

    def cancel(self) -> None:
        """Ends every thread that there still is."""
        self._layers.cancel([number for number, thread in enumerate(self._threads) if thread.is_alive()])
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _check(self) -> None:
        if self._error is not None:
            number, error = self._error
            error.add_note(f"in micro-batch {number} of {len(self._batches)}, counted from 0")
            raise error

    def _is_same_way(self, way: tuple[list[int], list[int]] | None) -> bool:
        """Whether all micro-batches of all ranks went the same way through the model."""
        ranks = self._parts.ranks
        if ranks.alone:
            return way is not None
        with self._parts.watch.waiting("the order of layers", "train_batch"):
            ways = ranks.gather_objects(way)
        return way is not None and all(each == [*way] for each in ways)

    def _work(self, number: int) -> None:
        failed = True
        try:
            self._layers.enter(number)
            self._run(number)
            failed = False
        except Cancelled:
            pass
        except BaseException as error:
            self._error = self._error or (number, error)
        finally:
            self._layers.leave(number, failed=failed)

    def _run(self, number: int) -> None:
        # The graph ends with this call, before another micro-batch goes on.
        loss = self._forward(number)
        self._layers.between(number)
        self._parts.scaler.apply(loss).backward()  # type: ignore[no-untyped-call]
        self._layers.conclude(number)

    def _forward(self, number: int) -> torch.Tensor:
        parts = self._parts
        batch, self._batches[number] = self._batches[number], None

        def model(*inputs: Any, **kwargs: Any) -> Any:
            inputs, kwargs = cast_inputs(parts.config, (inputs, kwargs))
            with forward_context(parts.config, parts.device):
                return parts.module(*inputs, **kwargs)

        loss = loss_of(model, batch, self._loss_fn)
        self._losses[number] = loss.detach()
        return loss / len(self._batches) if len(self._batches) > 1 else loss
