"""What an engine is made of, and how it ends."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from zeroxide.config import Config
from zeroxide.device.health import DeviceHealth
from zeroxide.device.transfers import Transfers
from zeroxide.distributed import Job, Ranks, Watch
from zeroxide.engine.accumulation import Accumulation, Counters
from zeroxide.engine.data import Loaders
from zeroxide.engine.evaluation import thaw
from zeroxide.engine.observers import Observers
from zeroxide.engine.peak import Peak
from zeroxide.engine.rows import CutVocabulary
from zeroxide.engine.sequences import SharedSequences
from zeroxide.engine.tensor_parallel import Uncut
from zeroxide.engine.timers import Timers
from zeroxide.engine.update import Updater
from zeroxide.params.empty import ParameterTable
from zeroxide.plan.plan import Plan
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.zero.access.state_dict import StateDicts
from zeroxide.zero.detach import part_from
from zeroxide.zero.gather.gatherer import Gatherer
from zeroxide.zero.gather.weight_gather import WeightGather
from zeroxide.zero.guard import ModelGuard
from zeroxide.zero.hook_handle import PlainCopies
from zeroxide.zero.hooks import Hooks
from zeroxide.zero.live_core import LiveCore
from zeroxide.zero.param import ParameterContext
from zeroxide.zero.reduce.feedback import Residuals
from zeroxide.zero.reduce.gradient_reduction import GradientReduction
from zeroxide.zero.stowed_view import ActivationStore
from zeroxide.zero.unit import Unit

__all__ = ["Parts"]


@dataclass(kw_only=True)
class Parts:
    """The parts of one engine, all of them made and connected by `zeroxide.engine.build`."""

    module: nn.Module
    given: dict[str, Any]
    """The config as the user gave it, parsed."""
    config: Config
    job: Job
    sequences: SharedSequences | None
    """Who shares the sequences of a batch; None where nobody does."""
    ranks: Ranks
    """Those of the job that have this rank's part of the model."""
    tensor: Uncut
    """How its matrices are cut over others."""
    vocabulary: CutVocabulary
    """Its matrices that are cut by rows."""
    watch: Watch
    plan: Plan
    device: torch.device
    """Where the model computes."""
    health: DeviceHealth
    """Whether it still does."""
    transfers: Transfers | None
    """What copies to and from it; None where that is the host."""
    activations: ActivationStore | None
    """What keeps activations in host memory or on disk; None where they stay where they are."""
    core: LiveCore
    committed_note: str | None
    """What the last commit of the run before has noted; None where there is none."""
    units: list[Unit]
    weights: WeightGather
    reduction: GradientReduction
    residuals: Residuals | None
    """What quantising gradients has lost, where that is kept."""
    gatherer: Gatherer
    hooks: Hooks
    context: ParameterContext
    guard: ModelGuard
    state_dicts: StateDicts
    copies: PlainCopies
    tables: list[nn.Module]
    """Modules whose table of parameters is the engine's."""
    loading: list[Any]
    """Handles of the hooks that refuse `load_state_dict`."""
    set_aside: list[str]
    """Names of parameters that take no gradient while they are this engine's."""
    counters: Counters
    accumulation: Accumulation
    scaler: LossScaler
    timers: Timers
    observers: Observers
    peak: Peak
    updater: Updater
    optimizer: Any
    lr_scheduler: Any
    dataloader: DataLoader[Any] | None
    loaders: Loaders

    def close(self) -> None:
        """Takes the model out of the engine and ends everything, whatever fails on the way. Raises what failed first.

        At stages 0 to 2 parameters keep their values in memory of their own; at stage 3 they end empty.
        """
        core = self.core.take()
        readers: list[Unit] = []
        # In the order in which they were registered, last first.
        with ExitStack() as ended:
            ended.callback(self.job.world.close)
            ended.callback(self.job.close)
            ended.callback(self.watch.close)
            ended.callback(self.observers.close)
            ended.callback(lambda: self.core.end(core, readers))
            if self.activations is not None:
                ended.callback(self.activations.close)
            if self.transfers is not None:
                ended.callback(self.transfers.close)
            self._leave_model(readers)

    def _leave_model(self, readers: list[Unit]) -> None:
        self.context.hooks = None
        ParameterTable.take_off(self.tables)
        self.copies.close()
        self.hooks.close()
        self.state_dicts.close()
        for handle in self.loading:
            handle.remove()
        readers += part_from(self.module, self.units, params_always_full=self.plan.params_always_full)
        if self.plan.params_always_full:
            self.vocabulary.rejoin()
        thaw(self.module, self.set_aside)
