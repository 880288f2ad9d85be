"""From a model and a config to an engine, step by step. A step that fails leaves nothing of those before it behind.

Every step registers at once, on one ExitStack, how what it made is undone: sockets, threads, memory and files of the
core, hooks, and what the model was. Weights move late: until then a model over any number of ranks becomes what it was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from zeroxide import _core
from zeroxide.config import Config, load
from zeroxide.device.direct_storage import check_direct_storage
from zeroxide.device.health import DeviceHealth
from zeroxide.device.placement import HOST, compute_device, is_host, make_current
from zeroxide.device.transfers import Transfers
from zeroxide.distributed import Job, Ranks, Watch, agree, start
from zeroxide.engine.accumulation import Accumulation, Counters
from zeroxide.engine.activations import idle_keys, keep_activations
from zeroxide.engine.data import Loaders, check_schedule, schedule_for
from zeroxide.engine.engine import Engine
from zeroxide.engine.evaluation import freeze, thaw
from zeroxide.engine.experts import leave_out_unrouted, take_experts
from zeroxide.engine.heap import plan_within, prepare_heap
from zeroxide.engine.meeting import meet
from zeroxide.engine.observers import Observers, open_observers
from zeroxide.engine.offload_states import check_offload
from zeroxide.engine.optimizer import EngineOptimizer
from zeroxide.engine.parts import Parts
from zeroxide.engine.peak import Peak
from zeroxide.engine.pipeline.engine import PipelineEngine
from zeroxide.engine.pipeline.prepare import stages_for
from zeroxide.engine.request import Request
from zeroxide.engine.resident import resident_without
from zeroxide.engine.rows import CutVocabulary, cut_vocabulary
from zeroxide.engine.sequences import SharedSequences, share_sequences
from zeroxide.engine.tensor_parallel import Uncut, cut_matrices
from zeroxide.engine.timers import Timers
from zeroxide.engine.update import Updater
from zeroxide.kernels import Launcher
from zeroxide.moe.spread import SpreadExperts, with_experts
from zeroxide.optim.groups import check_all_grouped, check_groups, groups_for, state_facts, state_plans
from zeroxide.parallel.pipe.stages import PipelineStages
from zeroxide.params.empty import ParameterTable
from zeroxide.plan.home import Home
from zeroxide.plan.on_device import place_state
from zeroxide.plan.plan import Plan
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.precision.policy import cast_buffers, check_batch_norms, check_shapes, own_dtype, torch_dtype
from zeroxide.zero.access.state_dict import StateDicts, refuse_loading
from zeroxide.zero.buffers import check_buffers, move_buffers
from zeroxide.zero.connect import connect
from zeroxide.zero.core import open_core
from zeroxide.zero.gather.choice import make_weight_gather
from zeroxide.zero.gather.device_weights import ResidentWeights, make_device_weights
from zeroxide.zero.gather.gatherer import Gatherer
from zeroxide.zero.gather.weight_gather import WeightGather
from zeroxide.zero.guard import ModelGuard
from zeroxide.zero.hook_handle import PlainCopies
from zeroxide.zero.hooks import Hooks
from zeroxide.zero.init.materialize import fill_units, replace_meta_parameters
from zeroxide.zero.leaf import mark_leaf_modules
from zeroxide.zero.live_core import LiveCore
from zeroxide.zero.messages import Messages
from zeroxide.zero.on_device.core import device_part
from zeroxide.zero.on_device.state import StateOnDevice
from zeroxide.zero.param import ParameterContext, shard_all
from zeroxide.zero.recompute import recompute
from zeroxide.zero.reduce.choice import make_reduction
from zeroxide.zero.reduce.feedback import Residuals
from zeroxide.zero.reduce.gradient_reduction import GradientReduction
from zeroxide.zero.reduce.offload import GradientOffload, OffloadedReduction, kept_where_they_arrive
from zeroxide.zero.reduce.quantised import QuantisedGradients
from zeroxide.zero.reduce.timed import TimedReduction
from zeroxide.zero.stowed_view import ActivationStore
from zeroxide.zero.undo import Undo
from zeroxide.zero.unit import Unit
from zeroxide.zero.untraced import leave_untraced
from zeroxide.zero.whole import Whole

__all__ = ["STEPS", "build"]

logger = logging.getLogger("zeroxide")


class Build:
    """An engine that is being made: each step adds what the ones after it need."""

    world: Ranks
    job: Job
    stages: PipelineStages | None
    ranks: Ranks
    """Those that have this rank's part of the model: most of what is made here knows no others."""
    config: Config
    sequences: SharedSequences | None
    loader: DataLoader[Any] | None
    set_aside: list[str]
    peak: Peak
    undo: Undo
    watch: Watch
    experts: SpreadExperts
    tensor: Uncut
    vocabulary: CutVocabulary
    observers: Observers
    groups: list[dict[str, Any]]
    device: torch.device
    plan: Plan
    messages: Messages
    core: LiveCore
    committed_note: str | None
    new: dict[int, nn.Parameter]
    """What has taken the place of parameters on the meta device, by the ids of those."""
    units: list[Unit]
    transfers: Transfers | None
    """What copies to and from the device; None where the model computes in host memory."""
    launcher: Launcher | None
    """What updates state that is at home on the device; None where none is."""
    grad_offload: GradientOffload | None
    activations: ActivationStore | None
    weights: WeightGather
    reduction: GradientReduction
    residuals: Residuals | None
    scaler: LossScaler
    counters: Counters
    timers: Timers
    updater: Updater
    optimizer: EngineOptimizer | None
    lr_scheduler: Any
    gatherer: Gatherer
    hooks: Hooks
    context: ParameterContext
    tables: list[nn.Module]
    guard: ModelGuard
    loading: list[Any]
    state_dicts: StateDicts
    copies: PlainCopies

    def __init__(self, asked: Request, made: ExitStack) -> None:
        self.asked = asked
        self.module = asked.model
        self.made = made
        self.health = DeviceHealth(HOST)

    # Before anything is changed -------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Finds the other ranks."""
        self.world = start(port=self.asked.distributed_port)
        self.made.callback(self.world.close)

    def read_config(self) -> None:
        """Reads the config, and refuses what it or the model rules out, on all ranks alike."""
        asked = self.asked
        own, ranks = partial(own_dtype, self.module), self.world.world
        self.config = load(asked.config, world_size=ranks, own_dtype=own, **asked.axes, **asked.shortcuts)
        self.stages = stages_for(self.world, self.module, asked.stages, self.config, self.made)
        self.config = with_experts(self.config, self.module, ranks, in_parts=self.stages is not None)
        self.job = meet(self.world, self.module, self.config, asked.training_data)
        self.made.callback(self.job.close)
        self.ranks = self.job.ranks
        self.sequences = share_sequences(self.job, asked.mpu)
        check_schedule(asked.lr_scheduler, asked.optimizer)
        check_batch_norms(self.module, self.config)

    def make_loader(self) -> None:
        """Makes the data loader."""
        self.loaders = Loaders(self.config, self.asked.collate_fn, self.world, self.job.mesh.batch_group())
        self.loader = self.loaders.training(self.asked.training_data)

    # What becomes of the model is undone from here on ---------------------------------------------------------------

    def set_gradients_aside(self) -> None:
        """Without an optimizer nothing is trained: no memory is kept for gradients and state."""
        only_looks = self.asked.optimizer is None and self.config.optimizer is None
        self.set_aside = []
        self.made.callback(lambda: thaw(self.module, self.set_aside))
        if only_looks:
            self.set_aside += freeze(self.module)

    def measure(self) -> None:
        """Begins to measure memory."""
        self.peak = Peak()
        for path, reason in self.config.no_effect:
            logger.warning("config key %s has no effect: %s", path, reason)

    def remember_model(self) -> None:
        """Remembers the model and the caller's optimizer as they are."""
        self.undo = Undo(self.module, self.asked.optimizer)
        self.made.callback(self.undo.restore)

    def watch_ranks(self) -> None:
        """Begins to watch the other ranks."""
        self.watch = Watch(self.world, parts=self.job.groups(), timeout=self.config.zeroxide.rank_timeout)
        self.made.callback(self.watch.close)

    def spread_experts(self) -> None:
        """Leaves this rank its own experts of those that are spread over ranks."""
        self.experts = take_experts(self.asked, self.module, self.config, self.job, self.watch, self.made)

    def open_observers(self) -> None:
        """Opens what training's numbers are written to."""
        self.observers = open_observers(self.config, self.world)
        self.made.callback(self.observers.close)

    def cut_matrices(self) -> None:
        """Leaves this rank its part of every matrix, where tensor-parallel ranks share them; cuts others by rows."""
        self.tensor = cut_matrices(self.module, self.config, self.job, self.watch, self.made)
        self.vocabulary = cut_vocabulary(self.module, self.config, self.ranks.world, self.undo)

    def group_parameters(self) -> None:
        """Finds what is trained with which hyperparameters."""
        asked, config = self.asked, self.config
        trained = any(param.requires_grad for param in self.module.parameters())
        only_looks = asked.optimizer is None and config.optimizer is None and not trained
        given, parts = self.experts.without_dropped(asked.model_parameters), self.vocabulary.replaced()
        elsewhere: frozenset[int] = frozenset() if self.stages is None else self.stages.elsewhere()
        self.groups = [] if only_looks else groups_for(self.module, config, asked.optimizer, given, elsewhere, parts)
        if self.groups and config.gradients.clipping_is_default and self.world.rank == 0:
            logger.warning("gradient_clipping is %g, the default; 0 is none", config.gradients.clipping)
        check_groups(self.groups)
        agree(self.ranks, state_facts(self.groups, config))

    def make_plan(self) -> None:
        """Decides what is where."""
        config = self.config
        mark_leaf_modules(self.module, config)
        check_buffers(self.module, self.ranks, made=self.asked.weights is not None)
        self.device = compute_device(config.zeroxide.device, self.module, self.world.local_rank)
        self.health.device = self.device
        make_current(self.device)
        check_direct_storage(config, self.device)
        states = state_plans(self.groups, config)
        asked, self.launcher = place_state(config, self.module, self.device, self.ranks.world)
        self.plan = plan_within(
            lambda: resident_without(self.module) - self.tensor.beside,
            self.module,
            config,
            threads=config.zeroxide.threads or len(os.sched_getaffinity(0)),
            ranks=self.ranks,
            states=states,
            device=self.device,
            asked=asked,
            experts=self.experts.params,
        )
        for path, reason in idle_keys(self.plan, config, self.device) if self.world.rank == 0 else ():
            logger.warning("config key %s has no effect: %s", path, reason)
        check_all_grouped(self.groups, [each for unit in self.plan.units for each in unit.params if each.trainable])

    def open_core(self) -> None:
        """Reserves all memory and disk space."""
        self.messages = Messages(self.ranks, self.watch)
        core, self.committed_note = open_core(self.plan, self.config, self.world)
        # Restoring the model closes it, after what it has of the weights was read.
        self.undo.moves(core, self.plan)
        self.made.callback(self.messages.close)
        self.core = LiveCore(core, self.messages)
        self.watch.on_failure(core.cancel)
        if self.config.zeroxide.trim_libraries:
            # Now, so that importing does not add to the peak of what follows, and again when that is done.
            _core.drop_clean_text()

    def make_units(self) -> None:
        """Gives the parameters their units; those on the meta device become empty ones in host memory."""
        self.new = replace_meta_parameters(self.module)
        # Units remember shapes before the parameters lose them.
        core = self.core()
        self.units = [
            Unit(index, unit, core, self.plan.compute, self.plan.groups_of(index), self.device)
            for index, unit in enumerate(self.plan.units)
        ]
        if (both := device_part(core)) is not None:
            assert self.launcher is not None, "no unit is at home on the device without one"
            both.state = StateOnDevice(both.host, self.plan, self.units, self.launcher, self.health)
        for unit in self.units:
            unit.params = [self.new.get(id(param), param) for param in unit.params]
        for group in self.groups:
            group["params"] = [self.new.get(id(param), param) for param in group["params"]]

    def connect(self) -> None:
        """Connects the ranks, what brings weights together and what reduces gradients; and the device to them."""
        core, plan, units, messages = self.core(), self.plan, self.units, self.messages
        self.weights = make_weight_gather(core, plan, units, messages)
        self.reduction = make_reduction(core, plan, units, messages, torch_dtype(self.config.precision.reduce_dtype))
        connect(core, plan, self.ranks)
        self.grad_offload = None
        self.transfers = None if is_host(self.device) else Transfers(self.health, plan.blocks_down)
        self.counters = Counters()
        self.activations = keep_activations(self.transfers, self.module, self.config, plan, self.made, self.counters)
        if self.transfers is not None:
            self.made.callback(self.transfers.close)
            on_device = None if (both := device_part(core)) is None else both.state
            self.grad_offload = GradientOffload(core, self.transfers, on_device)
            self.weights = make_device_weights(self.weights, self.transfers, plan, units, core.check_usable)
            if on_device is not None and isinstance(self.weights, ResidentWeights):
                on_device.connect(self.transfers, self.weights.changed)
            self.reduction = OffloadedReduction(self.reduction, self.grad_offload)

    def make_optimizer(self) -> None:
        """Makes the optimizer and the schedule over it."""
        core = self.core()
        place = {id(param): (unit, at) for unit in self.units for at, param in enumerate(unit.params)}
        for number, group in enumerate(self.groups):
            for param in group["params"]:
                unit, at = place[id(param)]
                core.set_group(unit.index, at, number)
        self.scaler = LossScaler(self.config.precision.loss_scale)
        breaks_down, leads = self.config.report.wall_clock_breakdown, self.world.rank == 0
        self.timers = Timers(self.device, breakdown=breaks_down, prints=leads)
        self.updater = Updater(
            self.config, self.core, self.job, self.plan.groups, self.watch, self.scaler, self.counters, self.timers
        )
        self.updater.repeated, self.updater.apart = self.tensor.repeated(self.units), self.plan.trained_apart()
        self.residuals, feedback = None, self.config.zero.feedback
        between = self.reduction.host if isinstance(self.reduction, OffloadedReduction) else self.reduction
        if feedback is not None and isinstance(between, QuantisedGradients):
            self.residuals = Residuals(core, self.units, self.plan.numbers.residuals, feedback, self.scaler)
            between.residuals = self.residuals
        check, apply = partial(check_offload, self.plan), self.updater.apply
        self.optimizer = EngineOptimizer(self.groups, core, apply, self.scaler, check) if self.groups else None
        self.lr_scheduler = schedule_for(self.config, self.asked.lr_scheduler, self.optimizer)

    def move_weights(self) -> None:
        """Moves rank 0's weights into the core. Parameters end empty, and buffers in the dtype of the config."""
        places = () if self.plan.expert_groups is None else self.plan.expert_groups.places
        source = self.vocabulary.source(self.tensor.spread(self.module, self.asked.weights))
        fill_units(self.module, self.plan.units, self.core(), source, self.new, self.ranks, places)
        for unit in self.units:
            for param, empty in zip(unit.params, unit.empties, strict=True):
                param.grad = None
                param.data = empty
        self.tensor.attach(self.module, self.units)
        move_buffers(self.module, self.device)
        cast_buffers(self.module, self.config)

    def hook_modules(self) -> None:
        """Sees to it that weights come where they are used, and gradients go where they belong."""
        config, plan = self.config, self.plan
        self.gatherer = Gatherer(
            self.core(),
            self.weights,
            self.units,
            config.zeroxide.prefetch,
            params_always_full=plan.params_always_full,
            home=plan.weights,
            world=plan.world,
            transient=plan.transient,
        )
        if self.grad_offload is not None:
            # Locked memory is resident: what has moved out of the model is not any more.
            self.grad_offload.go_straight(kept_where_they_arrive(plan, self.units), plan.grad)
        arriving = plan.grad if plan.world == 1 else torch_dtype(config.precision.reduce_dtype)
        reduction = (
            TimedReduction(self.reduction, self.timers.add_reduction) if self.timers.breakdown else self.reduction
        )
        self.hooks = Hooks(
            self.module, self.gatherer, reduction, self.units, arriving, self.grad_offload, self.activations
        )
        self.hooks.on_backward = self.timers.begin_backward, self.timers.end_backward
        self.hooks.handles += leave_out_unrouted(self.module, config, self.core(), self.units, self.ranks, self.watch)
        self.hooks.handles += recompute(plan.recompute.modules)
        self.made.callback(self.hooks.close)

    def keep_parameters(self) -> None:
        """Makes the engine answer for the parameters while they are empty."""
        plan = self.plan
        self.context = ParameterContext(
            self.core,
            self.gatherer,
            self.units,
            self.ranks,
            self.watch,
            params_always_full=plan.params_always_full,
            on_disk=plan.weights is Home.DISK,
            health=self.health,
            keeps_edits=plan.keeps_edits,
        )
        self.context.whole = Whole(self.tensor.group)
        shard_all(self.context)
        large = self.hooks.reducer.large
        for unit in self.units:
            unit.take_over(large.kinds(unit))
        large.attach()
        self.tables = [] if plan.params_always_full else ParameterTable.put(self.module, not self.gatherer.stays)
        self.context.hooks = self.hooks
        self.gatherer.before_release = None if plan.params_always_full else self.context.take_over_edits
        if self.optimizer is not None:
            self.updater.attach(self.optimizer, self.weights, self.hooks, self.context, self.residuals)

    def guard_model(self) -> None:
        """Notices what scripts do to the model, and answers for its state dicts and copies."""
        plan, module = self.plan, self.module
        shared = plan.world > 1 and plan.transport == "shared"
        self.guard = ModelGuard(module, self.context, self.hooks.reducer, keeps_edits=plan.keeps_edits, shared=shared)
        self.hooks.before_training = self.guard.before_training
        self.loading = refuse_loading(module)
        self.state_dicts = StateDicts(module, self.context, self.config.zeroxide.rank_timeout)
        self.copies = PlainCopies(module)
        leave_untraced()

    def show_weights(self) -> None:
        """Lets parameters that always show their values show their values."""
        prepare_heap(self.plan, self.config)
        self.gatherer.show_all()
        if (limit := self.config.zeroxide.host_memory) is not None and self.peak.at_start > limit:
            # What the caller held when it began, the model's weights among it, has moved out.
            self.peak.start_over()

    def engine(self) -> Engine:
        """The engine. Nothing is left that could fail."""
        parts = Parts(
            module=self.module,
            given=self.asked.config if isinstance(self.asked.config, dict) else dict(self.config.source),
            config=self.config,
            job=self.job,
            sequences=self.sequences,
            ranks=self.ranks,
            tensor=self.tensor,
            vocabulary=self.vocabulary,
            watch=self.watch,
            plan=self.plan,
            device=self.device,
            health=self.health,
            transfers=self.transfers,
            activations=self.activations,
            core=self.core,
            committed_note=self.committed_note,
            units=self.units,
            weights=self.weights,
            reduction=self.reduction,
            residuals=self.residuals,
            gatherer=self.gatherer,
            hooks=self.hooks,
            context=self.context,
            guard=self.guard,
            state_dicts=self.state_dicts,
            copies=self.copies,
            tables=self.tables,
            loading=self.loading,
            set_aside=self.set_aside,
            counters=self.counters,
            accumulation=Accumulation(self.config, self.loaders.group.size, self.counters, self.hooks.reducer),
            scaler=self.scaler,
            timers=self.timers,
            observers=self.observers,
            peak=self.peak,
            updater=self.updater,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            dataloader=self.loader,
            loaders=self.loaders,
        )
        return Engine(parts) if self.stages is None else PipelineEngine(parts, self.stages)


STEPS: tuple[tuple[str, Callable[[Build], None]], ...] = (
    ("ranks", Build.meet),
    ("config", Build.read_config),
    ("loader", Build.make_loader),
    ("evaluation", Build.set_gradients_aside),
    ("peak", Build.measure),
    ("undo", Build.remember_model),
    ("watch", Build.watch_ranks),
    ("experts", Build.spread_experts),
    ("observers", Build.open_observers),
    ("tensors", Build.cut_matrices),
    ("groups", Build.group_parameters),
    ("plan", Build.make_plan),
    ("core", Build.open_core),
    ("units", Build.make_units),
    ("connection", Build.connect),
    ("optimizer", Build.make_optimizer),
    ("weights", Build.move_weights),
    ("hooks", Build.hook_modules),
    ("parameters", Build.keep_parameters),
    ("guard", Build.guard_model),
    ("show", Build.show_weights),
)
"""All that happens between a request and an engine, in order."""


def build(asked: Request) -> Engine:
    """Makes the engine, or raises and leaves everything as it was."""
    check_shapes(asked.model)
    with ExitStack() as made:
        under_way = Build(asked, made)
        with under_way.health.doing("the engine was made"):
            for _, act in STEPS:
                act(under_way)
        engine = under_way.engine()
        made.pop_all()
    return engine
