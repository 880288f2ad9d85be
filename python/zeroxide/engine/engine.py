"""The engine: what users train with."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zeroxide.engine.accessors import Accessors
from zeroxide.engine.backward import run_backward
from zeroxide.engine.deepspeed_methods import ABSENT, DeepSpeedMethods
from zeroxide.engine.observers import StepFacts
from zeroxide.engine.optimizer import check_schedule_call
from zeroxide.engine.parts import Parts
from zeroxide.engine.peak import check_budget
from zeroxide.engine.report import print_progress
from zeroxide.engine.trace import EVENTS, Trace, record
from zeroxide.engine.train_batch import LossFn, WindowTrainer
from zeroxide.engine.training_state import TrainingState
from zeroxide.engine.update_in_backward import connect_updates
from zeroxide.errors import ConfigError, ModelError
from zeroxide.precision.policy import cast_inputs, forward_context
from zeroxide.zero.access.parameter_offload import ParameterOffload, external_parameters
from zeroxide.zero.access.state_dict import full_state_dict, load_given_state_dict, refuse_custom_load
from zeroxide.zero.untraced import leave_untraced

if TYPE_CHECKING:
    from zeroxide.checkpoint.durable.run import DurableRun
    from zeroxide.checkpoint.save.saver import Saver

__all__ = ["Engine"]


class Engine(Accessors, DeepSpeedMethods, nn.Module):
    """Trains `module` with its state at home where the config says. Made by `zeroxide.initialize`.

    The usual loop is `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`; `loss.backward()` does as well,
    and in fp16 `engine.scale(loss).backward()`: each divides by the accumulation steps.
    One optimizer step happens every `gradient_accumulation_steps` calls of `step`.

    An attribute that the engine does not have is the module's; where both have one, it is the engine's.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.module = parts.module
        self.config = parts.given
        self.ranks = parts.ranks
        self.watch = parts.watch
        self.global_rank = parts.job.world.rank
        self.local_rank = parts.ranks.local_rank
        self.world_size = parts.job.world.world
        self.training_dataloader = parts.dataloader
        self.training_state = TrainingState(parts)
        connect_updates(parts)
        self._window = WindowTrainer(parts, self, self.backward, self.step)
        self._saver: Saver | None = None
        self._durable: DurableRun | None = None
        if parts.config.zeroxide.durable_every and parts.plan.durable:
            self._durable = self._durable_run()
        if parts.optimizer is not None and parts.config.zero.stage == 3:
            parts.optimizer.parameter_offload = ParameterOffload(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            # What Python asks of an object by itself, and a property of the engine that fails, are not the module's.
            if module is None or (name.startswith("__") and name.endswith("__")) or hasattr(type(self), name):
                raise
        try:
            return getattr(module, name)
        except AttributeError:
            line = f"neither the engine nor its module, a {type(module).__name__}, has an attribute {name!r}"
            if name in ABSENT:
                line += f", which DeepSpeed's engine has: {ABSENT[name]}"
            raise AttributeError(line, name=name, obj=self) from None

    def ds_external_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter) of those that `zero.register_external_parameter` was called for."""
        return external_parameters(self.module)

    # Training -------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model. Every unit is gathered where it is used and released after."""
        parts = self.parts
        parts.core()
        leave_untraced()
        start = parts.timers.now()
        self.watch.doing = (self._phase("forward"), None, None, None)
        inputs, kwargs = cast_inputs(parts.config, (inputs, kwargs))
        depth = parts.hooks.current.depth
        with parts.health.doing("the model ran forward"):
            try:
                watched = parts.observers.around_forward(
                    self.module, parts.device, parts.counters.global_steps, parts.timers
                )
                before = 0 if parts.sequences is None else parts.sequences.exchanged
                with watched, forward_context(parts.config, parts.device):
                    output = self.module(*inputs, **kwargs)
                if parts.sequences is not None:
                    parts.sequences.check(self.module, before)
            except BaseException:
                parts.hooks.fail_forward(depth)
                raise
        parts.timers.add("fwd", start)
        return output

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Backward of a scalar loss, divided by the accumulation steps if `scale_wrt_gas`, and scaled in fp16.

        Returns the loss that was differentiated, without the loss scale. Raises ValueError for a loss that is not a
        scalar.
        """
        self._check_trained("backward")
        self._window.check_by_hand("backward")
        if loss.numel() != 1:
            raise ValueError(f"backward takes a scalar loss, got shape {tuple(loss.shape)}")
        parts, accumulation = self.parts, self.parts.accumulation
        if scale_wrt_gas and accumulation.steps > 1:
            loss = loss / accumulation.steps
        scaled = parts.scaler.apply(loss)
        run_backward(parts, "backward", lambda: torch.autograd.backward(scaled, retain_graph=retain_graph))
        accumulation.count_backward()
        parts.observers.note_loss(loss)
        return loss

    def _phase(self, what: str) -> str:
        """What other ranks are told that this one does."""
        return what

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for `engine.scale(loss).backward()`; without fp16 the loss itself.

        As with any `backward` of torch's own, gradients are those of the loss divided by the accumulation steps.
        """
        return self.parts.accumulation.scale(loss, self.parts.scaler)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Ends a micro-batch; at the accumulation boundary, updates the weights and moves the schedule on.

        A step whose gradients are not finite is left out and counted in `skipped_steps`.
        """
        self._check_trained("step")
        self._window.check_by_hand("step")
        self._end_micro_batch(lr_kwargs or {})

    def train_batch(self, data_iter: Any = None, loss_fn: LossFn | None = None) -> torch.Tensor:
        """All of one optimizer step: forward and backward of its micro-batches, the update, and the schedule.

        data_iter: an iterator, of which `gradient_accumulation_steps` micro-batches are taken before anything is
            computed; None for the engine's data loader, which begins anew at its end.
        loss_fn: makes a loss of (outputs, labels), of micro-batches that are pairs (inputs, labels). Without it the
            model returns the loss, or has it as `loss`, under "loss", or first.

        `zeroxide.accumulation_order` says in which order micro-batches go through the model; the result is the same.
        Returns the mean loss of all micro-batches over all ranks, fp32 of shape (), without a graph. Every rank calls
        it. Raises StopIteration, with nothing changed, where the iterator has too few micro-batches on any rank;
        ModelError in the middle of a step by hand, and as the model does. After an error in a micro-batch the gradients
        of all are forgotten, and the next call begins anew.
        """
        self._check_trained("train_batch")
        losses = self._window.accumulate(data_iter, loss_fn)
        self._window.end(self._end_micro_batch)
        return self._window.mean(losses)

    def _end_micro_batch(self, lr_kwargs: dict[str, Any]) -> None:
        self.parts.accumulation.stepping = True
        try:
            with self.parts.health.doing("a step was made"):
                self._step(lr_kwargs)
        finally:
            self.parts.accumulation.stepping = False

    def _step(self, lr_kwargs: dict[str, Any]) -> None:
        parts, counters = self.parts, self.parts.counters
        boundary = parts.accumulation.is_boundary()
        if parts.updater.early is not None:
            parts.updater.early.before_step(boundary)
        if boundary:
            # Before anything is counted: the same call works when the change has been made where it counts.
            parts.guard.before_step()
            parts.optimizer.check()
            if self._durable is not None:
                self._durable.check_resumed()
            check_schedule_call(parts.lr_scheduler, lr_kwargs)
        counters.micro_steps += 1
        parts.updater.applied = False
        if not boundary:
            parts.timers.end_step(boundary=False)
            return
        parts.optimizer.step()
        if parts.updater.applied and parts.lr_scheduler is not None:
            parts.lr_scheduler.step(**lr_kwargs)
        parts.accumulation.count_step()
        check_budget(parts.peak, parts.config.zeroxide.host_memory, counters.global_steps)
        every = parts.config.report.steps_per_print
        if every and counters.global_steps % every == 0:
            about = self.get_lr()[0], parts.updater.norm, counters.skipped_steps, parts.updater.redone
            print_progress(counters.global_steps, *about)
        parts.observers.after_step(self._step_facts(), parts.timers, parts.accumulation.samples_of_step)
        if self._durable is not None:
            parts.context.take_down_edits()
            self._durable.after_step()
        parts.timers.end_step(boundary=True)

    def _step_facts(self) -> StepFacts:
        parts, counters = self.parts, self.parts.counters
        io = parts.core().io() if parts.observers.monitor.writes else None
        return StepFacts(
            step=counters.global_steps,
            samples=counters.samples,
            lr=self.get_lr()[0],
            norm=parts.updater.norm,
            loss_scale=parts.scaler.scale if self.fp16_enabled() else None,
            applied=parts.updater.applied,
            skipped=counters.skipped_steps,
            redone=parts.updater.redone if parts.plan.early.speculates else None,
            written=None if io is None else int(io["write_bytes"]),
        )

    def finish_step(self) -> None:
        """Waits until the optimizer step under way is done and on disk.

        Never needed for the result: with state on disk a step goes on after `step` returns, and whatever needs it
        waits. Raises StorageError if it failed.
        """
        self.parts.core().finish()

    @contextmanager
    def trace(self, path: str | Path, *, events: int = EVENTS) -> Iterator[Trace]:
        """Records what this rank does inside and when, and writes it to `path`: Perfetto and chrome://tracing open it.

        Calls of the engine, gathered weights, gradients, updates of tiles, the disk's reads and writes and what waits
        for them; no number changes. Of the core's events the newest `events` stay, in memory of the bucket "recorder";
        the file tells how many there were besides. In the end the optimizer step under way is finished, so that all of
        it is in the trace. What is yielded may forget what came first. Raises BudgetError where there is no room,
        StorageError where the file cannot be written, ModelError inside another trace of the engine,
        ConfigError for a number of events that is not 1 to 2^24.
        """
        with record(self.parts, Path(path), events) as trace:
            yield trace

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets every gradient that has been accumulated and not been used."""
        self.parts.core().clear_gradients()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside it, gradients accumulate on their rank and are exchanged by the next backward outside.

        Saves traffic; takes memory for all gradients of the model on every rank, and sums micro-batches in the dtype in
        which gradients travel.
        """
        self.parts.hooks.synchronize = False
        try:
            yield
        finally:
            self.parts.hooks.synchronize = True

    # Checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        leave_out_gradients: bool = False,
    ) -> Path:
        """Writes weights, optimizer state, schedule and `client_state` (JSON): all or nothing. Returns the path.

        Gradients are not part of it: between a backward and the step that uses it CheckpointError is raised, unless
        `leave_out_gradients` says that whoever resumes does without them. Here they stay.

        Every rank must call it. With `zeroxide.checkpoint_background` it returns when the save has begun: the
        checkpoint is there when `wait_for_checkpoint` has returned, and a failure is raised by that, by the next save
        or load, or by `destroy`, whichever comes first.
        """
        self._check_trained("save_checkpoint")
        self.parts.guard.check_parameters()
        state = {} if client_state is None else client_state
        include_frozen = not exclude_frozen_parameters
        with self.parts.health.noticing("a checkpoint was saved"):
            self.parts.context.take_down_edits()
            return self._saves().save(Path(save_dir), tag, state, save_latest, include_frozen, leave_out_gradients)

    def _saves(self) -> Saver:
        if self._saver is None:
            from zeroxide.checkpoint.save.saver import Saver

            reads = (lambda: None) if self._durable is None else self._durable.reads
            self._saver = Saver(self.training_state, reads)
        return self._saver

    def _durable_run(self) -> DurableRun:
        from zeroxide.checkpoint.durable.run import DurableRun

        return DurableRun(self.training_state, lambda: self._saves().before_commit())

    def resume(self) -> int:
        """Goes on from the last commit of a durable run. Returns the optimizer steps made by then; 0 without a commit.

        Called before the first step, as the last thing before the loop: weights, optimizer state, schedule, counters,
        `client_state` and the random number generators of torch, Python and numpy become what they were when the commit
        was made, whatever the model came with. Every rank must call it. Raises ModelError for a run that is not durable
        (`zeroxide.durable_every`), CheckpointError for one of another kind, StorageError for damage.
        """
        durable = self._durable_or_raise("resume")
        self._check_between_steps("resume")
        with self.parts.health.doing("a run was resumed"):
            self.parts.context.before_change()
            try:
                return durable.resume()
            finally:
                self.parts.context.after_change()

    @property
    def client_state(self) -> dict[str, Any]:
        """What each commit of a durable run holds for its caller, and `resume` brings back: JSON, such as where the
        data goes on. Raises ModelError for a run that is not durable."""
        return self._durable_or_raise("client_state").client_state

    def _check_between_steps(self, call: str) -> None:
        """Raises ModelError for a call that replaces state of which backward has updated a part."""
        if self.parts.updater.early is not None:
            self.parts.updater.early.check_closed(call)

    def _durable_or_raise(self, call: str) -> DurableRun:
        self._check_trained(call)
        if self._durable is None:
            raise ModelError(f"{call}: nothing is committed: zeroxide.durable_every is 0")
        return self._durable

    def wait_for_checkpoint(self) -> Path | None:
        """Waits for the save in the background, on every rank; its path, or None if there is none.

        Raises CheckpointError if it failed.
        """
        return None if self._saver is None else self._saver.conclude()

    def checkpoint_stats(self) -> dict[str, Any]:
        """What saving took on this rank so far: `saves`, `bytes` of state, and times in seconds.

        `seconds_stopped` is what training stood still for, in `save_checkpoint`, before an update and in waiting;
        `seconds_writing` is from the start of each save to its end. `memory` is what a save holds at present beside
        the state and `memory_peak` the most that one held, in bytes; `under_way` tells whether one is being written.
        """
        return self._saves().stats()

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[Path | None, dict[str, Any] | None]:
        """Loads what `save_checkpoint` wrote, at any world size, in any offload mode. Returns (path, client_state).

        Without `tag`, where nothing was saved, it returns (None, None) with a warning, and nothing changes. Raises
        ConfigError for `custom_load_fn`: no rank has a whole state dict to give it.
        """
        from zeroxide.checkpoint.load.load import load_checkpoint

        self._check_trained("load_checkpoint")
        refuse_custom_load("load_checkpoint", custom_load_fn)
        self._check_between_steps("load_checkpoint")
        self.wait_for_checkpoint()
        # What is of two steps already is not one that was left as it is, or that another checkpoint mends.
        self.parts.core().check_usable()
        with self.parts.health.doing("a checkpoint was loaded"):
            self.parts.context.before_change()
            try:
                return load_checkpoint(
                    self.training_state,
                    Path(load_dir),
                    tag,
                    strict=load_module_strict,
                    optimizer=load_optimizer_states and not load_module_only,
                    scheduler=load_lr_scheduler_states and not load_module_only,
                )
            finally:
                self.parts.context.after_change()

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str | None = None, exclude_frozen_parameters: bool = False
    ) -> Path:
        """Writes the live weights as safetensors that Hugging Face loads, cut into files, each rank what it holds.

        save_filename: "model.safetensors" if None. Where it ends in .bin, .pt or .pth, one file of `torch.save`
            instead, for which rank 0 must hold the model. Raises ConfigError for another one, ModelError, StorageError.
        """
        from zeroxide.checkpoint.convert.export import save_model
        from zeroxide.checkpoint.convert.pickled import SUFFIXES, save_pickled

        self.parts.context.take_down_edits()
        if save_filename is not None and save_filename.endswith(SUFFIXES):
            left_out = exclude_frozen_parameters
            gather = functools.partial(self.module_state_dict, exclude_frozen_parameters=left_out)
            return save_pickled(self.training_state.ranks, gather, Path(save_dir), save_filename)
        include_frozen = not exclude_frozen_parameters
        return save_model(self.training_state, Path(save_dir), save_filename, include_frozen=include_frozen)

    def module_state_dict(
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Live weights and buffers with all their values, on rank 0; an empty dict elsewhere. Every rank calls it.

        A parameter at a time is gathered, but rank 0 must hold the model; `save_16bit_model` does not need to. Raises
        ConfigError for `keep_vars`: what is gathered is a copy, and no variable of autograd's.
        """
        if keep_vars:
            raise ConfigError("module_state_dict: keep_vars: gathered values are copies", path="keep_vars")
        found = full_state_dict(self.module, self.parts.context, include_frozen=not exclude_frozen_parameters)
        destination = {} if destination is None else destination
        destination.update({prefix + name: value for name, value in found.items()})
        return destination

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """`module_state_dict` under the name that Hugging Face's libraries ask for; None on ranks other than 0."""
        found = self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        return found if self.global_rank == 0 else None

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, torch.Tensor] | None:
        """The same at every stage."""
        return self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)

    def load_module_state_dict(
        self,
        checkpoint: dict[str, Any],
        strict: bool = True,
        custom_load_fn: Any = None,
        fetch_z3_params: bool = False,
        z3_params_to_fetch: Any = None,
        allowed_missing_keys: Collection[str] | None = None,
    ) -> None:
        """Makes rank 0's `checkpoint`, a state dict or {"module": one}, the weights and buffers. Every rank calls it.

        Weights are taken as exact as they are given; optimizer state stays. `fetch_z3_params` and `z3_params_to_fetch`
        have no effect: values are always brought where they belong. Raises ModelError when names, other than
        `allowed_missing_keys`, or shapes do not fit, before anything changes; ConfigError for `custom_load_fn`.
        """
        refuse_custom_load("load_module_state_dict", custom_load_fn)
        may_miss = allowed_missing_keys or ()
        load_given_state_dict(self.module, self.parts.context, checkpoint, strict=strict, may_miss=may_miss)

    def destroy(self) -> None:
        """Ends all disk traffic, removes scratch files and hooks, gives memory back. Idempotent.

        Waits for a save in the background first; raises CheckpointError at the end if that failed. At stages 0 to 2 the
        model keeps its weights, in memory of its own; at stage 3 they are gone (see `module_state_dict`). In a forked
        child it only lets go: disk, memory and peers are the parent's.
        """
        if not self.parts.core.alive or self.parts.core.leave_to_parent():
            return
        try:
            if self._saver is not None:
                self._saver.finish()
        finally:
            self.parts.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "an engine cannot be copied or pickled: copy or save its module inside "
            "zeroxide.zero.GatheredParameters(engine.module), or call save_checkpoint"
        )

    def _check_trained(self, call: str) -> None:
        if self.parts.optimizer is None:
            self.parts.core()
            raise ModelError(
                f"{call}: the engine was made without an optimizer, to evaluate the model; give one in the config, as "
                "lr=..., or as an object to train it"
            )
