"""One optimizer step over all ranks: the norm of what has been accumulated, clipping, the update, or that it is left
out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.distributed import Job, UnitGroups, Watch
from zeroxide.engine.accumulation import Counters
from zeroxide.engine.optimizer import EngineOptimizer
from zeroxide.engine.timers import Timers
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.zero.gather.weight_gather import WeightGather
from zeroxide.zero.hooks import Hooks
from zeroxide.zero.live_core import LiveCore
from zeroxide.zero.param import ParameterContext
from zeroxide.zero.reduce.feedback import Residuals
from zeroxide.zero.reduce.norm import Apart, agree_on_norm

if TYPE_CHECKING:
    from zeroxide.engine.update_in_backward import BackwardUpdates

__all__ = ["Updater"]

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""


class Updater:
    """Makes the optimizer steps of one engine, for the optimizer that `attach` names."""

    def __init__(
        self,
        config: Config,
        core: LiveCore,
        job: Job,
        groups: UnitGroups,
        watch: Watch,
        scaler: LossScaler,
        counters: Counters,
        timers: Timers,
    ) -> None:
        self.norm: float | None = None
        """Norm of all gradients at the last step, before clipping and without the loss scale; None before the first."""
        self.applied = False
        """Whether the last step changed the weights."""
        self.redone = 0
        """Steps that backward had begun to update and that were made again, since they clipped."""
        self.clipping = config.gradients.clipping
        """Largest global gradient norm of the next step; None leaves gradients as they are."""
        self._config = config
        self._core = core
        self._job = job
        self.repeated: frozenset[tuple[int, int]] = frozenset()
        """(unit, position) of parameters whose gradients another part of the model counts in the norm."""
        self.early: BackwardUpdates | None = None
        """What backward has updated before the step; None where it does not."""
        self.apart: Apart = ()
        """Which parameters only some of the ranks train."""
        self._groups = groups
        self._watch = watch
        self._scaler = scaler
        self._counters = counters
        self._timers = timers

    def attach(
        self,
        optimizer: EngineOptimizer,
        weights: WeightGather,
        hooks: Hooks,
        context: ParameterContext,
        residuals: Residuals | None,
    ) -> None:
        """Says whose steps these are, and who must know when weights change or a step is made or left out."""
        self._optimizer, self._weights, self._hooks, self._context = optimizer, weights, hooks, context
        self._residuals = residuals

    def begin_early(self, early: _core.EarlyUpdates, *, speculates: bool) -> None:
        """Lets units be updated from here on with the hyperparameters as they are now, as a step does that does not
        clip; where it `speculates`, until the step says otherwise. Raises ConfigError for wrong ones."""
        self._optimizer.check()
        self._context.before_change()
        early.begin(self._optimizer.core_groups(), 1.0 / self._scaler.scale, speculates=speculates)

    def measure(self) -> float:
        """The norm of what has been accumulated on all ranks, without the loss scale. Every rank calls it."""
        sum_squares, nonfinite, _ = agree_on_norm(
            self._core(), self._job, self._groups, self._watch, repeated=self.repeated, apart=self.apart
        )
        return math.nan if nonfinite else math.sqrt(sum_squares) / self._scaler.scale

    def apply(self) -> None:
        """One step over what has been accumulated on any rank. Every rank calls it, and all update or leave it out
        together."""
        core, optimizer, config = self._core(), self._optimizer, self._config
        if self.early is not None:
            self.early.before_step(True)
        start = self._timers.now()
        sum_squares, nonfinite, accumulated = agree_on_norm(
            core, self._job, self._groups, self._watch, self.clipping or 0.0, self.repeated, self.apart
        )
        agreed = self._timers.now()
        if accumulated:
            self._scaler.check_used()
        loss_scale = self._scaler.scale
        self.norm = math.sqrt(sum_squares) / loss_scale if not nonfinite else math.nan
        finite = math.isfinite(self.norm)
        optimizer.overflow = config.precision.check_overflow and not finite
        if optimizer.overflow:
            self.norm = math.inf
            self._counters.skipped_steps += 1
            if self.early is not None:
                self.early.note(True)
                self.early.take_back()
            core.clear_gradients()
        elif accumulated:
            clip = self.clipping
            factor = min(1.0, clip / (self.norm + CLIP_EPSILON)) if clip and finite else 1.0
            if self.early is not None:
                self.early.note(factor != 1.0)
                if factor != 1.0:
                    self.redone += self.early.take_back()
            self._context.before_change()
            core.step(optimizer.core_groups(), factor / loss_scale)
            try:
                self._weights.after_step()
                self._hooks.after_step()
            except Exception as error:
                # The state is that of a step which nothing has counted.
                core.fail_step(str(error), True)
                raise
            # An autocast that the caller opened around several steps would go on with casts of the old weights.
            torch.clear_autocast_cache()
            self.applied = True
        elif self.early is not None and self.early.open:
            # Not a gradient came: it ends what has begun, and nothing changes.
            core.step(optimizer.core_groups(), 1.0 / loss_scale)
        if self.early is not None:
            self.early.after_step()
        if self._residuals is not None:
            self._residuals.after_step(self._counters.global_steps + 1, left_out=optimizer.overflow)
        if accumulated:
            self._scaler.update(optimizer.overflow)
        end = self._timers.now()
        self._timers.add("step", start, end)
        if self._timers.breakdown:
            self._timers.add("optimizer_gradients", start, agreed)
            self._timers.add("optimizer_step", agreed, end)
