"""What a checkpoint saves and loads of an engine: all that checkpoints know of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroxide import _core
from zeroxide.distributed import Ranks
from zeroxide.engine.accumulation import Counters
from zeroxide.engine.parts import Parts
from zeroxide.plan.home import Home
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.zero.durable import durable_job
from zeroxide.zero.unit import Unit

__all__ = ["TrainingState"]


class TrainingState:
    """Reads and changes the state of one training run. Whoever holds it keeps the core from ending on its own."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    # Who and where --------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the state: those that have this rank's part of the model."""
        return self._parts.ranks

    def align_random(self) -> None:
        """Random number generators were set: makes them the same where ranks must draw the same."""
        self._parts.tensor.align_random()

    @property
    def world(self) -> Ranks:
        """All ranks, which together have all parts."""
        return self._parts.job.world

    @property
    def in_parts(self) -> bool:
        """Whether ranks have different parameters, or parts of one."""
        axes = self._parts.config.mesh
        return axes is not None and (axes.cuts_the_model or axes.ep > 1)

    @property
    def experts_elsewhere(self) -> bool:
        """Whether ranks that compute the same tokens have the same experts, and save them."""
        return self._parts.job.tensor.rank != 0

    @property
    def core(self) -> _core.Offload:
        """What has the values. Raises RuntimeError after `destroy`."""
        return self._parts.core()

    @property
    def module(self) -> nn.Module:
        """The model, for names of parameters and for buffers."""
        return self._parts.module

    @property
    def units(self) -> Sequence[Unit]:
        """Units in the order of the core, and their parameters."""
        return self._parts.units

    @property
    def tile_elements(self) -> int:
        """Elements of a tile, which the core reads and writes at once."""
        return self._parts.plan.tile_elements

    @property
    def compute(self) -> torch.dtype:
        """dtype of live trainable weights, in words of which frozen parameters are laid out."""
        return self._parts.plan.compute

    def keeps_whole(self, part: str) -> bool:
        """Whether every rank keeps all of a part ("weights", "exp_avg", ...), and not its own shard of it."""
        return self._parts.config.zero.stage < (3 if part == "weights" else 1)

    @property
    def scratch_directory(self) -> Path | None:
        """Where state is at home on disk; None where it is in memory."""
        config, plan = self._parts.config, self._parts.plan
        homes = ((plan.weights, config.zero.offload_param), (plan.state, config.zero.offload_optimizer))
        return next((offload.path for home, offload in homes if home is Home.DISK), None)

    # What a manifest says -------------------------------------------------------------------------------------------

    @property
    def precision(self) -> str:
        """What forward computes in."""
        return self._parts.config.precision.dtype

    @property
    def format(self) -> str:
        """How the optimizer keeps exact weights, in each format that there is."""
        return ", ".join(self._parts.plan.formats)

    @property
    def optimizer(self) -> Any:
        """The engine's optimizer: its groups and their hyperparameters."""
        return self._parts.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule that the engine moves on, None if there is none."""
        return self._parts.lr_scheduler

    @property
    def loss_scaler(self) -> LossScaler:
        """The loss scale and what it has counted."""
        return self._parts.scaler

    @property
    def counters(self) -> Counters:
        """Steps and samples so far."""
        return self._parts.counters

    def resume(self, *, global_steps: int, skipped_steps: int, micro_steps: int, samples: int) -> None:
        """Goes on counting from these numbers, as `counters` has them."""
        self._parts.accumulation.resume(Counters(global_steps, skipped_steps, micro_steps, samples))

    # Gradients ------------------------------------------------------------------------------------------------------

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self._parts.accumulation.steps

    def inside_window(self) -> int:
        """Micro-batches since the last optimizer step."""
        return self._parts.accumulation.inside_window()

    def unused_gradients(self) -> int:
        """Parameters with a gradient that no step has used."""
        return self.core.grad_norm()[2]

    # Changes --------------------------------------------------------------------------------------------------------

    def release_all(self) -> None:
        """Ends the use of all weights: nobody may look at them while they change."""
        self._parts.gatherer.release_all()

    def forget_residuals(self) -> None:
        """Forgets what quantising gradients has lost: a checkpoint does not hold it, and whoever goes on from here has
        the bits of whoever resumes."""
        if self._parts.residuals is not None:
            self._parts.residuals.forget()

    def on_change(self, wait: Callable[[], None]) -> None:
        """`wait` is called before values change from here on, and may hold the change up."""
        self._parts.context.waits.append(wait)

    # Saving beside training -----------------------------------------------------------------------------------------

    @property
    def in_background(self) -> bool:
        """Whether training goes on while a checkpoint is written."""
        return self._parts.config.checkpoint.background

    @property
    def staging_memory(self) -> int | None:
        """Most bytes in which state may wait to be written: what was asked for, within what the budget leaves.

        None where neither sets a limit.
        """
        room, limit = self._parts.config.checkpoint.memory, self._parts.config.zeroxide.host_memory
        if limit is None:
            return room
        left = max(0, limit - self._parts.peak.since_start_over())
        return left if room is None else min(room, left)

    # Durable runs ---------------------------------------------------------------------------------------------------

    @property
    def durable_every(self) -> int:
        """Optimizer steps between commits; 0 for a run that leaves nothing."""
        return self._parts.config.zeroxide.durable_every

    @property
    def durable_path(self) -> Path:
        """Where a durable run's commits are; RuntimeError for another one."""
        directory = self.scratch_directory
        if directory is None:
            raise RuntimeError("nothing is at home on disk")
        return directory / durable_job(self._parts.config, self._parts.job.world.rank)

    @property
    def committed_note(self) -> str | None:
        """What the last commit of the run before has noted; None where there is none."""
        return self._parts.committed_note

    @property
    def shows_weights(self) -> bool:
        """Whether parameters always show their values, which anybody may then change."""
        return self._parts.plan.params_always_full

    def weights_renewed(self) -> None:
        """All weights have changed at home, on every rank, as they do in a step."""
        self._parts.weights.after_step()
        self._parts.hooks.after_step()
