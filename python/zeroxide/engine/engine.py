"""The engine: forward, backward and step of one model, and what holds them together."""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.distributed import IDLE, Ranks, Watch
from zeroxide.engine.accessors import Accessors
from zeroxide.engine.accumulation import Accumulation
from zeroxide.engine.evaluation import thaw
from zeroxide.engine.optimizer import EngineOptimizer, check_schedule_call
from zeroxide.engine.peak import Peak
from zeroxide.errors import BudgetError, ModelError
from zeroxide.optim.groups import check_all_grouped, check_groups, groups_for
from zeroxide.params.empty import ParameterTable
from zeroxide.plan.home import Home
from zeroxide.plan.plan import make_plan
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.precision.policy import cast_buffers, cast_inputs, forward_context, torch_dtype
from zeroxide.zero.access.state_dict import FullState, StateDicts, refuse_loading
from zeroxide.zero.buffers import check_buffers
from zeroxide.zero.core import open_core
from zeroxide.zero.detach import end_core, part_from
from zeroxide.zero.exchange import agree_on_norm, make_exchange
from zeroxide.zero.gather.gatherer import Gatherer
from zeroxide.zero.guard import ModelGuard
from zeroxide.zero.hook_handle import PlainCopies
from zeroxide.zero.hooks import Hooks
from zeroxide.zero.init.materialize import WeightSource, fill_units, replace_meta_parameters, resident_without
from zeroxide.zero.leaf import mark_leaf_modules
from zeroxide.zero.messages import Messages
from zeroxide.zero.param import ParameterContext, shard_all
from zeroxide.zero.undo import Undo
from zeroxide.zero.unit import Unit
from zeroxide.zero.untraced import leave_untraced

if TYPE_CHECKING:
    from zeroxide.checkpoint.save.background import Saver

__all__ = ["Engine"]

logger = logging.getLogger("zeroxide")

LARGE_BLOCK = 16 << 20
"""Bytes from which the allocator gives freed memory back when state is on disk: logits and their like."""
CLIP_EPSILON = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""


class Engine(Accumulation, Accessors, FullState, nn.Module):
    """Trains `module` with its state at home where the config says. Made by `zeroxide.initialize`.

    The usual loop is `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`; `loss.backward()` does as well,
    and in fp16 `engine.scale(loss).backward()`: each divides by the accumulation steps.
    One optimizer step happens every `gradient_accumulation_steps` calls of `step`.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        *,
        optimizer: Any = None,
        parameters: Any = None,
        weights: WeightSource | None = None,
        ranks: Ranks | None = None,
        scheduler: Callable[[Any], Any] = lambda optimizer: None,
    ) -> None:
        super().__init__()
        self.module = module
        self.config = config
        self.ranks = ranks or Ranks()
        self.global_rank = self.ranks.rank
        self.local_rank = self.ranks.local_rank
        self.world_size = self.ranks.world
        self.training_dataloader: DataLoader[Any] | None = None
        self.global_steps = 0
        self.skipped_steps = 0
        self._begin_counting()
        self._saver: Saver | None = None
        self._scaler = LossScaler(config.precision.loss_scale)
        self._norm, self._applied = None, False
        self._core: _core.Offload | None = None
        self._peak = Peak()
        self._times = {"forward": 0.0, "backward": 0.0, "step": 0.0}
        for path, reason in config.no_effect:
            logger.warning("config key %s has no effect: %s", path, reason)
        self.set_aside: list[str] = []  # names of parameters that take no gradient while they are this engine's
        undo = Undo(module, optimizer)
        with ExitStack() as made:
            made.callback(undo.restore)
            self.watch = Watch(self.ranks, timeout=config.zeroxide.rank_timeout)
            made.callback(self.watch.close)
            only_looks = optimizer is None and config.optimizer is None and not _is_trained(module)
            groups = [] if only_looks else groups_for(module, config, optimizer, parameters)
            if groups and config.gradients.clipping_is_default and self.global_rank == 0:
                logger.warning("gradient_clipping is %g, the default; 0 is none", config.gradients.clipping)
            check_groups(groups)
            mark_leaf_modules(module, config)
            check_buffers(module, self.ranks, made=weights is not None)
            threads = config.zeroxide.threads or len(os.sched_getaffinity(0))
            self._plan = make_plan(module, config, threads=threads, resident=resident_without(module), ranks=self.ranks)
            check_all_grouped(groups, [each for unit in self._plan.units for each in unit.params if each.trainable])
            self._core = open_core(self._plan, config)
            undo.moves(self._core, self._plan)
            self._process = os.getpid()
            self._messages = Messages(self.ranks, self.watch)
            made.callback(self._messages.close)
            # Also at the end of the process, which may come without `destroy`: scratch files are large.
            weakref.finalize(self, end_core, self._core, self._messages)
            self.watch.on_failure(self._core.cancel)
            self._place(module, groups, weights)
            self.lr_scheduler: Any = scheduler(self.optimizer)
            made.pop_all()
        if config.zeroxide.host_memory is not None and self._peak.at_start > config.zeroxide.host_memory:
            # What the caller held when it began, the model's weights among it, has moved out.
            self._peak.start_over()

    def _place(self, module: nn.Module, groups: list[dict[str, Any]], weights: WeightSource | None) -> None:
        """Moves the weights into the core and takes over the model's parameters."""
        assert self._core is not None
        core, plan = self._core, self._plan
        on_disk = Home.DISK in (plan.weights, plan.state)
        if self.config.zeroxide.trim_libraries:
            # Now, so that importing does not add to the peak of what follows, and again when that is done.
            _core.drop_clean_text()
        new = replace_meta_parameters(module)
        # Units remember shapes before the parameters lose them.
        units = [Unit(index, unit, core, plan.compute) for index, unit in enumerate(plan.units)]
        self._exchange = make_exchange(
            core, plan, units, self._messages, torch_dtype(self.config.precision.reduce_dtype)
        )
        self._exchange.connect()
        fill_units(module, plan.units, core, weights, new, self.ranks)
        for unit in units:
            unit.params = [new.get(id(param), param) for param in unit.params]
            for param, empty in zip(unit.params, unit.empties, strict=True):
                param.data = empty
                param.grad = None
        cast_buffers(module, self.config)
        for group in groups:
            group["params"] = [new.get(id(param), param) for param in group["params"]]
        self._units = units
        self._gatherer = Gatherer(
            core,
            self._exchange,
            units,
            self.config.zeroxide.prefetch,
            params_always_full=plan.params_always_full,
            home=plan.weights,
            world=plan.world,
        )
        arriving = plan.grad if plan.world == 1 else torch_dtype(self.config.precision.reduce_dtype)
        self._hooks = Hooks(module, self._gatherer, units, arriving)
        self._divide_gradients()
        self._assign_groups(groups)
        self._context = ParameterContext(
            self._alive,
            self._before_change,
            units,
            self.ranks,
            self.watch,
            replicated=plan.replicated,
            params_always_full=plan.params_always_full,
            on_disk=plan.weights is Home.DISK,
        )
        shard_all(self._context)
        large = self._hooks.reducer.large
        for unit in units:
            unit.take_over(large.kinds(unit))
        large.attach()
        self._tables = [] if plan.params_always_full else ParameterTable.put(module, not self._gatherer.stays)
        self._context.hooks = self._hooks
        self._gatherer.before_release = None if plan.params_always_full else self._context.take_over_edits
        shared = plan.world > 1 and plan.transport == "shared"
        self._guard = ModelGuard(
            module, self._context, self._hooks.reducer, keeps_edits=plan.keeps_edits, shared=shared
        )
        self._hooks.before_training = self._guard.before_training
        self._loading = refuse_loading(module)
        self._state_dicts = StateDicts(module, self._context, self.config.zeroxide.rank_timeout)
        self._copies = PlainCopies(module)
        leave_untraced()
        self.optimizer: Any = EngineOptimizer(groups, core, self._update, self._scaler) if groups else None
        _core.keep_freed_memory(LARGE_BLOCK if on_disk else None)
        if self.config.zeroxide.trim_libraries:
            _core.drop_clean_text()
        # Last: nothing can fail any more and leave parameters over memory that is gone.
        self._gatherer.show_all()

    def _assign_groups(self, groups: list[dict[str, Any]]) -> None:
        core = self._alive()
        place = {id(param): (unit, at) for unit in self._units for at, param in enumerate(unit.params)}
        for number, group in enumerate(groups):
            for param in group["params"]:
                unit, at = place[id(param)]
                core.set_group(unit.index, at, number)

    # Training -------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model. Every unit is gathered where it is used and released after."""
        self._alive()
        leave_untraced()
        start = time.perf_counter()
        self.watch.doing = ("forward", None, None, None)
        inputs, kwargs = cast_inputs(self.config, (inputs, kwargs))
        depth = self._hooks.forward_depth
        try:
            with forward_context(self.config):
                output = self.module(*inputs, **kwargs)
        except BaseException:
            self._hooks.fail_forward(depth)
            raise
        self._times["forward"] += time.perf_counter() - start
        return output

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Backward of a scalar loss, divided by the accumulation steps if `scale_wrt_gas`, and scaled in fp16.

        Returns the loss that was differentiated, without the loss scale. Raises ValueError for a loss that is not a
        scalar.
        """
        self._check_trained("backward")
        if loss.numel() != 1:
            raise ValueError(f"backward takes a scalar loss, got shape {tuple(loss.shape)}")
        if scale_wrt_gas and self.gradient_accumulation_steps() > 1:
            loss = loss / self.gradient_accumulation_steps()
        start = time.perf_counter()
        self.watch.doing = ("backward", None, None, None)
        self._hooks.begin_backward()
        # Divided already, or not to be.
        self._hooks.reducer.divisor = 1
        try:
            self._scaler.apply(loss).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        except BaseException:
            self._hooks.fail_backward()
            raise
        finally:
            self._divide_gradients()
        self._hooks.end_backward()
        self._backwards += 1
        self.watch.doing = IDLE
        self._times["backward"] += time.perf_counter() - start
        return loss

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Ends a micro-batch; at the accumulation boundary, updates the weights and moves the schedule on.

        A step whose gradients are not finite is left out and counted in `skipped_steps`.
        """
        self._check_trained("step")
        self._stepping = True
        try:
            self._step(lr_kwargs or {})
        finally:
            self._stepping = False

    def _step(self, lr_kwargs: dict[str, Any]) -> None:
        boundary = self.is_gradient_accumulation_boundary()
        if boundary:
            # Before anything is counted: the same call works when the change has been made where it counts.
            self._guard.before_step()
            self.optimizer.check()
            check_schedule_call(self.lr_scheduler, lr_kwargs)
        self.micro_steps += 1
        self._applied = False
        if not boundary:
            return
        self.optimizer.step()
        if self._applied and self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        self._count_step()
        self._check_budget()
        self._report()

    def _update(self) -> None:
        """One optimizer step over what has been accumulated: norm, clipping and update."""
        core = self._alive()
        start = time.perf_counter()
        sum_squares, nonfinite, accumulated = agree_on_norm(core, self.ranks, self.watch)
        if accumulated:
            self._scaler.check_used()
        loss_scale = self._scaler.scale
        self._norm = math.sqrt(sum_squares) / loss_scale if not nonfinite else math.nan
        finite = math.isfinite(self._norm)
        self.optimizer.overflow = self.config.precision.check_overflow and not finite
        if self.optimizer.overflow:
            self._norm = math.inf
            self.skipped_steps += 1
            core.clear_gradients()
        elif accumulated:
            clip = self.config.gradients.clipping
            factor = min(1.0, clip / (self._norm + CLIP_EPSILON)) if clip and finite else 1.0
            self._before_change()
            core.step(self.optimizer.core_groups(), factor / loss_scale)
            self._exchange.after_step()
            self._hooks.after_step()
            # An autocast that the caller opened around several steps would go on with casts of the old weights.
            torch.clear_autocast_cache()
            self._applied = True
        if accumulated:
            self._scaler.update(self.optimizer.overflow)
        self._times["step"] += time.perf_counter() - start

    def _before_change(self) -> None:
        """Waits until state may change: a save in the background has what it needs, and no weights are on their way."""
        self._context.changes += 1
        self._context.forget_by_hand()
        self._gatherer.drain()
        if self._saver is not None:
            self._saver.before_update()

    def finish_step(self) -> None:
        """Waits until the optimizer step under way is done and on disk.

        Never needed for the result: with state on disk a step goes on after `step` returns, and whatever needs it
        waits. Raises StorageError if it failed.
        """
        self._alive().finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets every gradient that has been accumulated and not been used."""
        self._alive().clear_gradients()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside it, gradients accumulate on their rank and are exchanged by the next backward outside.

        Saves traffic; takes memory for all gradients of the model on every rank, and sums micro-batches in the dtype in
        which gradients travel.
        """
        self._hooks.synchronize = False
        try:
            yield
        finally:
            self._hooks.synchronize = True

    # Checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Path:
        """Writes weights, optimizer state, schedule and `client_state` (JSON): all or nothing. Returns the path.

        Every rank must call it. With `zeroxide.checkpoint_background` it returns when the save has begun: the
        checkpoint is there when `wait_for_checkpoint` has returned, and a failure is raised by that, by the next save
        or load, or by `destroy`, whichever comes first.
        """
        self._check_trained("save_checkpoint")
        self._guard.check_parameters()
        if self._saver is None:
            from zeroxide.checkpoint.save.background import Saver

            self._saver = Saver(self)
        state = {} if client_state is None else client_state
        return self._saver.save(Path(save_dir), tag, state, save_latest, not exclude_frozen_parameters)

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
        if self._saver is None:
            from zeroxide.checkpoint.save.background import Saver

            self._saver = Saver(self)
        return self._saver.stats()

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[Path | None, dict[str, Any] | None]:
        """Loads what `save_checkpoint` wrote, at any world size, in any offload mode. Returns (path, client_state).

        Without `tag`, where nothing was saved, it returns (None, None) with a warning, and nothing changes.
        """
        from zeroxide.checkpoint.load.load import load_checkpoint

        self._check_trained("load_checkpoint")
        self.wait_for_checkpoint()
        self._before_change()

        return load_checkpoint(
            self,
            Path(load_dir),
            tag,
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
        )

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str | None = None, exclude_frozen_parameters: bool = False
    ) -> Path:
        """Writes the live weights as safetensors that Hugging Face loads, cut into files, each rank what it holds."""
        from zeroxide.checkpoint.convert.export import save_model

        return save_model(self, Path(save_dir), save_filename, include_frozen=not exclude_frozen_parameters)

    def destroy(self) -> None:
        """Ends all disk traffic, removes scratch files and hooks, gives memory back. Idempotent.

        Waits for a save in the background first; raises CheckpointError at the end if that failed. At stages 0 to 2 the
        model keeps its weights, in memory of its own; at stage 3 they are gone (see `module_state_dict`). In a forked
        child it only lets go: disk, memory and peers are the parent's.
        """
        if self._core is None:
            return
        if os.getpid() != self._process:
            self._core = None
            return
        try:
            if self._saver is not None:
                self._saver.finish()
        finally:
            core, self._core = self._core, None
            readers: list[Unit] = []
            try:
                if hasattr(self, "_context"):
                    self._context.hooks = None
                    ParameterTable.take_off(self._tables)
                if hasattr(self, "_hooks"):
                    self._copies.close()
                    self._hooks.close()
                    self._state_dicts.close()
                    for handle in self._loading:
                        handle.remove()
                    readers = part_from(self.module, self._units, params_always_full=self._plan.params_always_full)
                thaw(self.module, self.set_aside)
            finally:
                self._messages.drain()
                end_core(core, self._messages, readers)
                self.watch.close()
                self.ranks.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "an engine cannot be copied or pickled: copy or save its module inside "
            "zeroxide.zero.GatheredParameters(engine.module), or call save_checkpoint"
        )

    # Inside -----------------------------------------------------------------------------------------------------

    def _check_trained(self, call: str) -> None:
        if self.optimizer is None:
            self._alive()
            raise ModelError(
                f"{call}: the engine was made without an optimizer, to evaluate the model; give one in the config, as "
                "lr=..., or as an object to train it"
            )

    def _check_budget(self) -> None:
        limit = self.config.zeroxide.host_memory
        if limit is None:
            return
        peak = self._peak.since_start_over()
        if peak > limit:
            # The next step is measured by itself, so that a smaller batch helps.
            self._peak.start_over()
            raise BudgetError(
                f"resident memory reached {peak / 2**20:.0f} MiB, the budget is {limit / 2**20:.0f} MiB: after step "
                f"{self.global_steps} everything is intact; raise host_memory, or lower the batch or sequence length",
                need=peak,
                limit=limit,
            )


def _is_trained(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters())
