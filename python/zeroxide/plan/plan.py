"""From a model and a config to its units and their homes. Every byte is counted by `_core.Plan`."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from zeroxide import _core
from zeroxide.config import Activations, Config
from zeroxide.device.placement import DTYPE_NAMES, HOST, is_host
from zeroxide.device.transfers import BLOCKS, blocks_down, pinned_bytes
from zeroxide.distributed import ProcessMesh, Ranks, UnitGroups
from zeroxide.plan.checks import check_gradients, check_max_norm, check_together
from zeroxide.plan.discover import UnitPlan, find_units, is_leaf
from zeroxide.plan.home import Home
from zeroxide.plan.parameters import EXTERNAL, ParameterPlan
from zeroxide.plan.quantisation import QuantisationPlan, plan_quantisation
from zeroxide.plan.recompute import Recompute, plan_recompute
from zeroxide.plan.report import describe
from zeroxide.plan.schedule import ONE_MICRO_BATCH, Passes
from zeroxide.plan.state import StatePlan
from zeroxide.plan.update_in_backward import EarlyPlan, plan_early_updates
from zeroxide.precision.policy import torch_dtype

__all__ = ["EXTERNAL", "ParameterPlan", "Plan", "UnitPlan", "is_leaf", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What was chosen."""

    units: list[UnitPlan]
    numbers: _core.Plan
    """Homes and bytes, counted as the core counts them."""
    compute: torch.dtype
    grad: torch.dtype
    comm: torch.dtype
    """In which gradients travel between ranks."""
    threads: int
    limit: int | None
    resident_before: int
    """Bytes that the process uses without the state."""
    groups: UnitGroups = field(default_factory=UnitGroups)
    expert_groups: UnitGroups | None = None
    """Those of units of experts; None where no experts are spread over ranks."""
    stage: int = 0
    offloads_weights: bool = False
    """Whether the config asks for parameters somewhere else than where the model computes."""
    device: torch.device = HOST
    """Where the model computes."""
    transport: str = "collective"
    """"shared" or "collective": what carries gradients between ranks."""
    quantisation: QuantisationPlan = field(default_factory=QuantisationPlan)
    """What travels between ranks as integers."""
    device_limit: int | None = None
    """Most bytes that the engine may take on the device, as the config says."""
    blocks_down: int = BLOCKS
    """Blocks of page-locked memory for copies down from the device."""
    durable: bool = False
    """Whether state survives the process."""
    early: EarlyPlan = field(default_factory=EarlyPlan)
    """Whether the update of a unit begins inside of backward."""
    activations: Activations = field(default_factory=Activations)
    """Where activations wait for backward in host memory."""
    recompute: Recompute = field(default_factory=Recompute)
    """Blocks whose activations are computed again in backward."""
    in_flight: int = 1
    """Most micro-batches whose backward is outstanding at once: in a pipeline, as many as its schedule has."""

    @property
    def weights(self) -> Home:
        """Home of all weights."""
        return Home(self.numbers.weights)

    @property
    def state(self) -> Home:
        """Home of all optimizer state, but of `units_on_device`."""
        return Home(self.numbers.state)

    @property
    def gradients(self) -> Home:
        """Where gradients wait for the step, but those of `units_on_device`; CONSUMED where they do not."""
        return Home(self.numbers.gradients)

    @cached_property
    def units_on_device(self) -> frozenset[int]:
        """Numbers of the units that are at home on the device: weights, optimizer state and gradients."""
        return frozenset(index for index, home in enumerate(self.numbers.states) if home == "device")

    def groups_of(self, unit: int) -> UnitGroups:
        """Who trains a unit, by its number."""
        if self.expert_groups is not None and self.units[unit].experts:
            return self.expert_groups
        return self.groups

    def trained_apart(self) -> list[tuple[slice, tuple[int, ...]]]:
        """Which of the trainable parameters of all units, by their numbers, only some ranks train; and those ranks."""
        found, first = [], 0
        for index, unit in enumerate(self.units):
            end = first + sum(entry.trainable for entry in unit.params)
            if unit.experts:
                found.append((slice(first, end), self.groups_of(index).everyone))
            first = end
        return found

    @property
    def world(self) -> int:
        """Ranks that train the model."""
        return self.groups.world

    @property
    def rank(self) -> int:
        """This rank among them."""
        return self.groups.rank

    @property
    def replicated(self) -> bool:
        """Whether every rank keeps all gradients and optimizer state."""
        return self.groups.replicated

    @property
    def params_always_full(self) -> bool:
        """Whether parameters show their values at all times: every rank has them anyway."""
        return self.stage < 3

    @property
    def transient(self) -> bool:
        """Whether weights are on a device other than the host, and only while they are used: at stage 3 the device has
        not all of them, but for a single rank whose config leaves its parameters there."""
        return not is_host(self.device) and not self.params_always_full and (self.world > 1 or self.offloads_weights)

    @property
    def keeps_edits(self) -> bool:
        """Whether a change in place of a parameter that always shows its values counts: the update takes it over into
        the master weight.

        Not where one copy of the weights serves several ranks: each rank's change would act on top of the others'.
        """
        return self.params_always_full and (self.world == 1 or self.transport == "collective")

    @property
    def buckets(self) -> dict[str, int]:
        """Bytes of payload in every step, by bucket."""
        return self.numbers.buckets

    @property
    def payload(self) -> int:
        """Bytes of all buckets together."""
        return sum(self.buckets.values())

    @property
    def tile_elements(self) -> int:
        """Elements in a tile that touches the disk."""
        return self.numbers.tile_elements

    @property
    def disk_bytes(self) -> int:
        """Bytes that the state takes on disk: of a durable run, two versions of all of it; where updates may be taken
        back, two versions of what is on disk, but for gradients."""
        if self.early.speculates:
            return 2 * self.numbers.disk_bytes - self.numbers.spilled_bytes
        return self.numbers.durable_bytes if self.durable else self.numbers.disk_bytes

    def expected_peaks(self, *, loaded: bool = False) -> dict[str, int]:
        """Bytes of payload at the most, by bucket and under "total".

        Filling in the initial values, or those of a checkpoint that is `loaded`, takes memory beside the staging ring.
        """
        peaks = self.numbers.peak_buckets(loaded)
        return {**peaks, "total": sum(peaks.values())}

    def expected_process(
        self,
        made: Mapping[str, int],
        forward: Mapping[str, int],
        backward: Mapping[str, int],
        *,
        loaded: bool = False,
    ) -> int:
        """Most resident bytes of the process in all steps, told when a first backward has ended and nothing is updated.

        `made`, `forward` and `backward` are `engine.memory()["process"]` when training began, after the first forward
        and now. What the pass took is measured; what only an update writes, the staging ring and moments in host
        memory, is added, and 2.5 % for fragments of the allocator.
        """
        grown = backward["heap"] - forward["heap"]
        passed = backward["peak"], backward["rss"], max(0, grown)
        return self.numbers.expected_process(made["peak"], *passed, loaded, self.early.updates)

    def expected_traffic(self, passes: Passes = ONE_MICRO_BATCH) -> tuple[int, int]:
        """Bytes read from and written to disk in a step of `passes`, once all state has been written once; where
        updates may be taken back, in one that does not clip."""
        read, written = self.numbers.disk_traffic([(backward, list(units)) for backward, units in passes])
        less, more = self.numbers.speculation_traffic if self.early.speculates else (0, 0)
        return read - less, written + more

    def traffic_of_redone(self) -> tuple[int, int]:
        """Bytes read and written that come on top where a step clips after backward has updated: all state and weights
        on disk are read and written again, and gradients there are read."""
        moved = self.numbers.disk_bytes - self.numbers.spilled_bytes
        return moved + self.numbers.spilled_bytes, moved

    @property
    def formats(self) -> list[str]:
        """The formats that optimizer state is stored in."""
        trained = [unit.state.format for unit in self.units if unit.trainable]
        return list(dict.fromkeys(trained or [unit.state.format for unit in self.units]))

    def describe(self) -> list[str]:
        """The plan in lines for people."""
        return describe(self)

    def __str__(self) -> str:
        """Those lines."""
        return "\n".join(self.describe())


def make_plan(
    module: nn.Module,
    config: Config,
    *,
    threads: int,
    resident: int,
    ranks: Ranks | None = None,
    states: Mapping[int, StatePlan] | None = None,
    device: torch.device = HOST,
    asked: _core.DeviceRequest | None = None,
    experts: Container[int] = (),
) -> Plan:
    """Finds the units of `module` and places them.

    `experts` are those of `find_units`. `states` says by the ids of trainable parameters how each is updated; Adam in
    the config's format where it does not. `resident` is the process's resident memory in bytes without the model's
    parameters, to which come locked buffers of copies to and from `device`, which computes, and of activations. `asked`
    is what it is to have. Raises ModelError for a model that cannot train, BudgetError beyond the config's budgets.
    """
    compute, ranks = torch_dtype(config.precision.dtype), ranks or Ranks()
    units = find_units(module, config, compute, world=ranks.world, states=states or {}, device=device, experts=experts)
    blocks = _blocks_down(config, ranks, units)
    resident += pinned_bytes(device, blocks) + config.activations.memory
    check_together(config, ranks, device)
    early = plan_early_updates(config, ranks, device)
    check_max_norm(module, config, ranks)
    transport = _transport(config, ranks)
    grad, comm = torch_dtype(config.precision.grad_dtype), torch_dtype(config.precision.reduce_dtype)
    quantisation = plan_quantisation(config, ranks, units, transport, compute)
    mesh = ProcessMesh(ranks.rank, ranks.world, None if config.mesh is None else config.mesh.data_axes())
    groups = mesh.unit_groups(sharded=config.zero.stage > 0, secondary=quantisation.secondary)
    expert_groups = mesh.unit_groups(sharded=config.zero.stage > 0, experts=True) if mesh.ep > 1 else None
    check_gradients(config, groups, transport)
    numbers = _core.Plan(
        units=_units(units),
        rank=groups.rank,
        shards=groups.shard.size,
        replicas=groups.replicate.size,
        stage=config.zero.stage,
        transport=transport,
        compute=DTYPE_NAMES[compute],
        grad=DTYPE_NAMES[grad],
        comm=DTYPE_NAMES[comm],
        weights_on_disk=config.zero.offload_param.kind == "nvme",
        state_on_disk=config.zero.offload_optimizer.kind == "nvme",
        prefetch=config.zeroxide.prefetch,
        gradients=_gradient_home(config, early),
        pinned=config.zeroxide.state_in_memory or 0,
        quantisation=quantisation.for_core(),
        tile_bytes=config.zeroxide.tile_bytes,
        staging_bytes=config.zeroxide.staging_bytes or None,
        limit=config.zeroxide.host_memory,
        resident=resident,
        device=asked,
        apart=_apart(units, expert_groups),
    )
    return Plan(
        units=units,
        numbers=numbers,
        compute=compute,
        grad=grad,
        comm=comm,
        threads=threads,
        limit=config.zeroxide.host_memory,
        resident_before=resident,
        groups=groups,
        expert_groups=expert_groups,
        stage=config.zero.stage,
        offloads_weights=config.zero.offload_param.enabled,
        device=device,
        transport=transport,
        quantisation=quantisation,
        device_limit=config.zeroxide.device_memory,
        blocks_down=blocks,
        durable=config.zeroxide.durable_every > 0 and bool(states),
        early=early.after(_saved(numbers)),
        activations=config.activations,
        recompute=plan_recompute(module, config),
    )


def _saved(numbers: _core.Plan) -> int:
    """Bytes on disk that a step takes less if backward updates before the norm is known, and nothing clips."""
    less, more = numbers.speculation_traffic
    return less - more


def _gradient_home(config: Config, early: EarlyPlan) -> _core.GradientHome | None:
    """Where gradients are to wait for the step; None leaves it to the plan. They need not, where each backward is a
    step's only one and updates."""
    own = config.zeroxide
    if own.gradients != "auto":
        return _core.GradientHome(own.gradients)
    consumes = early.updates and not early.speculates and config.batch.gradient_accumulation_steps == 1
    return _core.GradientHome.CONSUMED if consumes else None


def _transport(config: Config, ranks: Ranks) -> str:
    """What carries gradients: shared memory is laid out for units that all ranks train."""
    collective = config.zeroxide.transport == "collective" or (config.mesh is not None and config.mesh.ep > 1)
    return "shared" if ranks.shares_memory and not collective else "collective"


def _apart(units: list[UnitPlan], groups: UnitGroups | None) -> list[tuple[int, int, int, int]]:
    """(unit, this rank, shards, replicas) of units that only some ranks train, as the core's planner takes them."""
    if groups is None:
        return []
    position = groups.rank, groups.shard.size, groups.replicate.size
    return [(index, *position) for index, unit in enumerate(units) if unit.experts]


def _blocks_down(config: Config, ranks: Ranks, units: list[UnitPlan]) -> int:
    """Blocks for copies down from a device: enough for the largest gradient, where those of every step pass through
    them and do not go straight to where they are kept."""
    adds = config.batch.gradient_accumulation_steps > 1
    if ranks.world == 1 and config.zero.offload_optimizer.kind != "nvme" and not adds:
        return BLOCKS
    itemsize = torch_dtype(config.precision.dtype).itemsize
    return blocks_down(
        max((entry.numel * itemsize for unit in units for entry in unit.params if entry.trainable), default=0)
    )


UnitRow = tuple[str, list[tuple[int, bool]], bool, _core.Rule, str, int]
"""A unit as the core's planner takes it."""


def _units(units: list[UnitPlan]) -> list[UnitRow]:
    """The units as the core's planner takes them; units of the same modules have one turn."""
    rows: list[UnitRow] = []
    turn = 0
    for index, unit in enumerate(units):
        if index and list(map(id, unit.modules)) != list(map(id, units[index - 1].modules)):
            turn = index
        params = [(entry.words, entry.trainable) for entry in unit.params]
        rows.append((unit.name, params, unit.held_through_backward, unit.state.optimizer, unit.state.format, turn))
    return rows
