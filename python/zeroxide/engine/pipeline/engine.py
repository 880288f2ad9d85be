"""The engine of a model that is cut into stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch.autograd.graph import GradientEdge

from zeroxide.device.placement import HOST, in_host
from zeroxide.distributed import IDLE
from zeroxide.engine.backward import run_backward
from zeroxide.engine.engine import Engine
from zeroxide.engine.parts import Parts
from zeroxide.engine.pipeline.data import Batches
from zeroxide.engine.pipeline.tied import TiedWeights
from zeroxide.errors import ConfigError, ModelError, PipelineError, RanksError
from zeroxide.parallel.pipe.halves import Halves
from zeroxide.parallel.pipe.link import StageLink
from zeroxide.parallel.pipe.runner import Runner
from zeroxide.parallel.pipe.schedule import Action, Kind, Schedule, make_schedule, most_kept, passes_of
from zeroxide.parallel.pipe.stages import PipelineStages, units_of
from zeroxide.plan.plan import Plan
from zeroxide.plan.schedule import Passes
from zeroxide.zero.current_pass import Uses

__all__ = ["PipelineEngine"]

T = TypeVar("T")


class PipelineEngine(Engine):
    """Trains a model over the stages of a pipeline: `train_batch` is forward, backward and step of all micro-batches.

    Made by `zeroxide.initialize` of a `PipelineModule`, or of any model with `zeroxide.mesh.pp`. Every rank calls the
    same methods. `module` has this rank's part of the model.
    """

    def __init__(self, parts: Parts, stages: PipelineStages) -> None:
        super().__init__(parts)
        _check_orders(parts)
        # No attribute that holds a module: `stages` may be one, which is `module` already.
        self._pipe = _Pipe(self, stages)
        stages.commit()

    # One step --------------------------------------------------------------------------------------------------------

    def train_batch(  # type: ignore[override]  # the module has its loss function
        self, data_iter: Iterable[Any] | None = None
    ) -> torch.Tensor:
        """One optimizer step over `gradient_accumulation_steps` micro-batches. Returns their mean loss, on every rank.

        data_iter: what the micro-batches are taken from, from now on; this rank's own, as all ranks of a pipeline draw
        the same samples from theirs. Raises StopIteration, on every rank, where the data ends before the step is
        complete: nothing is updated, and the micro-batches that were left are gone.
        """
        self._check_trained("train_batch")
        if not torch.is_grad_enabled():
            raise PipelineError("train_batch inside torch.no_grad(): gradients are needed; use eval_batch to evaluate")
        pipe, accumulation = self._pipe, self.parts.accumulation
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        count = accumulation.steps
        batches = pipe.batches.take("train_batch", count, self.global_steps)
        shared = self.parts.sequences
        before = 0 if shared is None else shared.exchanged
        with pipe.telling():
            losses = pipe.run(batches, pipe.schedule(count).orders[pipe.rank])
            # By the last stage, for all.
            self.parts.scaler.note_scaled()
            if shared is not None:
                shared.check_stages(before)
            pipe.tied.sum_gradients()
            self.parts.counters.micro_steps += count - 1
            boundary, accumulation.boundary = accumulation.boundary, True
            try:
                Engine.step(self)
            finally:
                accumulation.boundary = boundary
            return pipe.mean(losses, count)

    def eval_batch(
        self,
        data_iter: Iterable[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Runs micro-batches forward, without gradients, in the mode of evaluation. Training data stays where it is.

        compute_loss: whether the last stage computes a loss; without it the result is what the last stage gave.
        reduce_output: "avg" for the mean over micro-batches (and ranks with other samples, of losses), None for a list
            of one entry a micro-batch.
        bcast_loss: whether every rank gets it; otherwise the last stage, and None elsewhere.
        num_micro_batches: as many as for training if None.

        Returns the loss, or (loss, logits of all micro-batches) with `return_logits`; logits are None but on the last
        stage. Raises as `train_batch`.
        """
        if reduce_output not in ("avg", None):
            raise ConfigError(f'reduce_output: expected "avg" or None, got {reduce_output!r}', path="reduce_output")
        pipe = self._pipe
        count = num_micro_batches or self.parts.accumulation.steps
        iterator, modes = pipe.batches.iterator, [(each, each.training) for each in self.module.modules()]
        try:
            pipe.batches.iterator = iter(data_iter)
            batches = pipe.batches.take("eval_batch", count, self.global_steps)
            self.module.eval()
            with pipe.telling(), torch.no_grad():
                pipe.compute_loss = compute_loss
                order = [Action(Kind.FORWARD, stage, at) for stage in pipe.stages.own_stages for at in range(count)]
                losses = pipe.run(batches, order)
                outputs = pipe.outputs
                if not compute_loss:
                    return outputs if pipe.is_last else None
                reduced: Any = pipe.mean(losses, count) if reduce_output else pipe.every(losses, count)
        finally:
            pipe.compute_loss, pipe.outputs = True, []
            pipe.batches.iterator = iterator
            for module, mode in modes:
                module.training = mode
        if not (bcast_loss or pipe.is_last):
            reduced = None
        logits = [pipe.stages.logits_of(each) for each in outputs] if pipe.is_last else None
        return (reduced, logits) if return_logits else reduced

    # What is left to `train_batch` -----------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Raises PipelineError."""
        _refuse("forward")

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Raises PipelineError."""
        _refuse("backward")

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Raises PipelineError."""
        _refuse("step")

    # Data ------------------------------------------------------------------------------------------------------------

    def set_dataiterator(self, iterator: Iterable[Any]) -> None:
        """Takes micro-batches from `iterator` from now on."""
        self._pipe.batches.iterator = iter(iterator)

    def set_dataloader(self, loader: Iterable[Any] | None) -> None:
        """Takes micro-batches from `loader` from now on, from its beginning whenever it ends."""
        self._pipe.batches.repeat(loader)

    def set_batch_fn(self, fn: Callable[[Any], Any] | None) -> None:
        """Each micro-batch becomes what `fn` makes of it, before it is used."""
        self._pipe.batches.batch_fn = fn

    # Where this rank is ----------------------------------------------------------------------------------------------

    @property
    def num_stages(self) -> int:
        """Ranks of the pipeline."""
        return self._pipe.stages.num_stages

    @property
    def stage_id(self) -> int:
        """This rank in the pipeline."""
        return self._pipe.stages.stage_id

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.parts.accumulation.steps

    def is_first_stage(self) -> bool:
        """Whether this rank has the first stage."""
        return 0 in self._pipe.stages.own_stages

    def is_last_stage(self) -> bool:
        """Whether this rank has the last stage, which knows the loss."""
        return self._pipe.is_last

    def pipeline_schedule(self) -> Schedule:
        """The order in which the stages compute."""
        return self._pipe.schedule(self.micro_batches)

    def plan(self) -> Plan:
        """What was chosen, with as many micro-batches at once as the schedule keeps on this rank."""
        order = self._pipe.schedule(self.micro_batches).orders[self._pipe.rank]
        return dataclasses.replace(super().plan(), in_flight=most_kept(order)[0])

    def pipeline_passes(self) -> Passes:
        """What this rank goes through in a step: `plan().expected_traffic` counts what that moves to and from the disk,
        and `zeroxide.plan.schedule.collectives` what it exchanges with the ranks that have the same stages."""
        pipe = self._pipe
        plan, order = self.parts.plan, pipe.schedule(self.micro_batches).orders[pipe.rank]
        return passes_of(order, lambda stage: units_of(pipe.stages, plan, stage))

    def pipeline_bytes_sent(self) -> int:
        """Bytes of activations, their gradients and tied weights that this rank has sent to other stages."""
        return self._pipe.link.bytes_sent

    def reset_activation_shape(self) -> None:
        """Does nothing: shapes may always differ from one micro-batch to the next."""

    def set_has_attention_mask(self, value: bool) -> None:
        """Does nothing: whatever stages give one another is sent."""

    def _phase(self, what: str) -> str:
        return self._pipe.under_way or what


class _Pipe:
    """What drives the stages of one rank. Computes them for the runner (see `Compute`)."""

    def __init__(self, engine: PipelineEngine, stages: PipelineStages) -> None:
        parts = engine.parts
        self.engine = engine
        self.stages = stages
        self.ranks = parts.job.stages
        self.rank = self.ranks.rank
        self.is_last = stages.total_stages - 1 in stages.own_stages
        self.link = StageLink(self.ranks, parts.watch, stages.total_stages, parts.device)
        self.runner = Runner(stages.schedule, self.ranks, stages.total_stages, self.link, self)
        self.batches = Batches(
            parts.job.world,
            parts.watch,
            parts.device,
            needed=stages.needs_batches(),
            shared=stages.shared_of,
            pipelines=parts.job.mesh.partition("pp"),
        )
        self.batches.repeat(parts.dataloader)
        self.tied = TiedWeights(parts.module, stages.ties(), self.ranks, self.link)
        self.tied.make_equal()
        parts.updater.repeated |= self.tied.counted_elsewhere(parts.units)
        self.under_way: str | None = None
        self.compute_loss = True
        self.outputs: list[Any] = []
        """What the last stage gave for each micro-batch of an evaluation."""
        self._inputs: list[Any] = []
        self._losses: dict[int, torch.Tensor] = {}
        self._uses: dict[tuple[int, int], Uses] = {}
        self._schedules: dict[int, Schedule] = {}

    def schedule(self, micro_batches: int) -> Schedule:
        """The orders for so many micro-batches. Raises ConfigError where the schedule does not take them."""
        if micro_batches not in self._schedules:
            stages = self.stages
            self._schedules[micro_batches] = make_schedule(
                stages.schedule, stages.num_stages, stages.stages_per_rank, micro_batches
            )
        return self._schedules[micro_batches]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the other ranks when this one fails: each would wait for what it would have sent."""
        try:
            yield
        except RanksError:
            raise
        except BaseException as error:
            self.engine.watch.failed(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.under_way = None
            self._inputs = []
            self._uses.clear()

    def run(self, batches: list[Any], order: Iterable[Action]) -> dict[int, torch.Tensor]:
        """Follows an order over the batches. Returns the losses by micro-batch, on the last stage."""
        self._inputs, self._losses, self.outputs = batches, {}, []
        self.runner.run(order)
        losses, self._losses = self._losses, {}
        return losses

    # For the runner --------------------------------------------------------------------------------------------------

    def forward(self, stage: int, micro_batch: int, received: Any) -> Any:
        """See `Compute`."""
        engine, hooks, batch = self.engine, self.engine.parts.hooks, self._inputs[micro_batch]
        self.under_way = f"forward of micro-batch {micro_batch} in stage {stage}"
        args, kwargs = self.stages.arguments(stage, received, batch)
        training = torch.is_grad_enabled()
        if training:
            # What its forward used is for its own backward to know, whatever comes between.
            hooks.uses = Uses()
        output = Engine.forward(engine, *args, **kwargs)
        engine.watch.doing = IDLE
        if training:
            self._uses[stage, micro_batch] = hooks.uses
        if stage < self.stages.total_stages - 1:
            return output
        if not training:
            self.outputs.append(output)
            if not self.compute_loss:
                return None
        loss = self.stages.loss_of(output, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shown = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ModelError(f"the last stage of a pipeline must come to a scalar loss, got {shown}: give a loss_fn")
        self._losses[micro_batch] = loss.detach()
        engine.parts.observers.note_loss(loss)
        if not training:
            return None
        steps = engine.parts.accumulation.steps
        return engine.parts.scaler.apply(loss / steps if steps > 1 else loss)

    def backward(
        self,
        stage: int,
        micro_batch: int,
        outputs: list[torch.Tensor | GradientEdge],
        gradients: list[torch.Tensor | None],
    ) -> None:
        """See `Compute`."""
        self.under_way = f"backward of micro-batch {micro_batch} in stage {stage}"
        self.engine.parts.hooks.uses = self._uses.pop((stage, micro_batch))
        roots: Any = outputs
        self._run_backward(lambda: torch.autograd.backward(roots, gradients))
        self.engine.parts.accumulation.count_backward()

    def backward_input(self, stage: int, micro_batch: int, halves: Halves) -> list[torch.Tensor | None]:
        """See `Compute`."""
        self.under_way = f"backward of micro-batch {micro_batch} in stage {stage}, its inputs"
        hooks = self.engine.parts.hooks
        hooks.uses = self._uses[stage, micro_batch]
        before, hooks.synchronize = hooks.synchronize, False
        try:
            return self._run_backward(halves.inputs)
        finally:
            hooks.synchronize = before

    def backward_weight(self, stage: int, micro_batch: int, halves: Halves) -> None:
        """See `Compute`."""
        self.under_way = f"backward of micro-batch {micro_batch} in stage {stage}, its weights"
        self.engine.parts.hooks.uses = self._uses.pop((stage, micro_batch))
        self._run_backward(halves.weights)
        self.engine.parts.accumulation.count_backward()

    def _run_backward(self, run: Callable[[], T]) -> T:
        return run_backward(self.engine.parts, self.under_way or "backward", run)

    # What all ranks get to know --------------------------------------------------------------------------------------

    def every(self, losses: dict[int, torch.Tensor], count: int) -> list[torch.Tensor]:
        """The loss of each micro-batch, averaged over the ranks that have other samples; on every rank."""
        parts = self.engine.parts
        mine = torch.zeros(count, dtype=torch.float32, device=HOST)
        for micro_batch, loss in losses.items():
            mine[micro_batch] = in_host(loss).float().reshape(())
        with parts.watch.waiting("the loss"):
            if self.is_last and parts.ranks.world > 1:
                rows = parts.ranks.gather_rows(mine, "averaging the loss")
                mine = rows.double().mean(0).float()
        if self.ranks.world > 1:
            with parts.watch.waiting("the loss of the last stage"):
                rows = self.ranks.gather_rows(
                    torch.cat([mine, torch.full((1,), float(self.is_last), device=HOST)]), "the loss"
                )
            mine = rows[int(rows[:, -1].argmax()), :-1]
        return [each.to(parts.device) for each in mine.unbind()]

    def mean(self, losses: dict[int, torch.Tensor], count: int) -> torch.Tensor:
        """The mean of `every`."""
        every = self.every(losses, count)
        return torch.stack(every).double().mean().float()


def _check_orders(parts: Parts) -> None:
    own = parts.config.zeroxide
    asked = {"accumulation_order": own.accumulation_order != "batches", "micro_batch_seeds": own.micro_batch_seeds}
    for name in (name for name, given in asked.items() if given):
        raise ConfigError(
            f"zeroxide.{name}: in a pipeline its schedule orders micro-batches: leave it out", path=f"zeroxide.{name}"
        )


def _refuse(call: str) -> NoReturn:
    raise PipelineError(
        f"engine.{call}: a pipeline runs steps as a whole: call engine.train_batch(data_iter), or engine.eval_batch"
    )
