"""Where each unit's bytes are at home, and what that costs in memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.distributed import Ranks
from zeroxide.errors import BudgetError, ConfigError, ModelError
from zeroxide.plan.discover import UnitPlan, find_units, is_leaf
from zeroxide.plan.parameters import EXTERNAL, ParameterPlan, check_sharing, parameters_of
from zeroxide.precision.bits import FLOATS, why_not_bytes
from zeroxide.precision.policy import torch_dtype
from zeroxide.zero.init.slices import slice_of
from zeroxide.zero.param_handle import handle_of
from zeroxide.zero.passes import Home

__all__ = ["EXTERNAL", "ParameterPlan", "Plan", "UnitPlan", "is_leaf", "make_plan", "padded_sizes"]

MIB = 1 << 20
DEFAULT_UNIT_BYTES = 512 * MIB
DEFAULT_TILE_ELEMENTS = 512 << 10
DEFAULT_STAGING_BYTES = 32 * MIB
FRAME = 2 * MIB
TILE_QUANTUM = 2048
MIN_TILES_IN_RING = 2
SLOTS = 3
"""Units whose gradients can be on their way to other ranks at once, as the core counts them."""


@dataclass
class Plan:
    """What was chosen, in bytes."""

    units: list[UnitPlan]
    compute: torch.dtype
    format: str
    grad: torch.dtype
    weights: Home
    state: Home
    tile_elements: int
    staging_bytes: int
    gathered_bytes: int
    threads: int
    limit: int | None
    resident_before: int
    world: int = 1
    rank: int = 0
    stage: int = 0
    transport: str = "collective"
    """"shared" or "collective": what carries gradients between ranks."""
    buckets: dict[str, int] = field(default_factory=dict)

    @property
    def replicated(self) -> bool:
        """Whether every rank keeps all gradients and optimizer state."""
        return self.world > 1 and self.stage == 0

    @property
    def params_always_full(self) -> bool:
        """Whether parameters show their values at all times: every rank has them anyway."""
        return self.stage < 3

    @property
    def keeps_edits(self) -> bool:
        """Whether a change in place of a parameter that always shows its values counts: the update takes it over into
        the master weight.

        Not where one copy of the weights serves several ranks: each rank's change would act on top of the others'.
        """
        return self.params_always_full and (self.world == 1 or self.transport == "collective")

    @property
    def payload(self) -> int:
        """Bytes of all buckets together."""
        return sum(self.buckets.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes that the state takes on disk."""
        weight = self.compute.itemsize
        total = 0
        for unit in self.units:
            total += unit.words * weight // self.world if self.weights is Home.DISK else 0
            share = 1 if self.replicated else self.world
            total += unit.trainable * self.state_bytes // share if self.state is Home.DISK else 0
        return total

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state per trainable element, without the live weight."""
        if self.compute == torch.float32:
            return 8
        return 10 if self.format == "split" else 12

    def describe(self) -> list[str]:
        """The plan in lines for people."""
        total = sum(unit.numel for unit in self.units)
        trainable = sum(unit.trainable for unit in self.units)
        share = 100.0 * trainable / total if total else 0.0
        shared = self.world > 1 and self.transport == "shared" and not self.replicated
        home = {
            Home.HOST: "in host memory" + (", one copy for all ranks" if shared else ""),
            Home.SHARD: "in host memory, a shard on each rank",
            Home.DISK: "on disk",
        }[self.weights]
        lines = [
            f"{total / 1e6:.1f} M parameters ({share:.0f} % trainable) in {len(self.units)} units; "
            f"{_dtype(self.compute)} weights at home {home}",
            f"optimizer state in {'host memory' if self.state is Home.HOST else 'files'}, format {self.format}; "
            f"gradients {_dtype(self.grad)} in host memory; {self.threads} optimizer threads",
        ]
        if self.world > 1:
            carrier = "shared memory" if self.transport == "shared" else "collectives"
            lines.append(f"rank {self.rank} of {self.world}, ZeRO stage {self.stage}, gradients through {carrier}")
        buckets = ", ".join(f"{name} {size / MIB:.0f}" for name, size in self.buckets.items() if size)
        lines.append(f"payload {self.payload / MIB:.0f} MiB ({buckets}); on disk {self.disk_bytes / MIB:.0f} MiB")
        if self.limit is not None:
            rest = self.limit - self.resident_before - self.payload
            lines.append(
                f"budget {self.limit / MIB:.0f} MiB: {self.resident_before / MIB:.0f} in use before, "
                f"{rest / MIB:.0f} left for activations"
            )
        return lines


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_plan(module: nn.Module, config: Config, *, threads: int, resident: int, ranks: Ranks | None = None) -> Plan:
    """Finds the units of `module` and places them.

    `resident` is the resident memory of the process in bytes without the model's own parameters. Raises ModelError
    for a model that cannot be trained, BudgetError when `config.zeroxide.host_memory` cannot hold the payload.
    """
    compute = torch_dtype(config.precision.dtype)
    entries = list(parameters_of(module, compute, cast=config.precision.asked))
    check_model(module, entries, config)
    unit_bytes = config.zeroxide.unit_bytes or DEFAULT_UNIT_BYTES
    units = find_units(module, entries, unit_bytes // compute.itemsize, FRAME // compute.itemsize)
    ranks = ranks or Ranks()
    if ranks.world > 1:
        units = [part for unit in units for part in _by_trainable(unit)]
    transport = _transport(config, ranks)
    weights = Home.DISK if config.zero.offload_param.kind == "nvme" else Home.HOST
    if weights is Home.HOST and ranks.world > 1 and config.zero.stage == 3 and transport == "collective":
        weights = Home.SHARD
    state = Home.DISK if config.zero.offload_optimizer.kind == "nvme" else Home.HOST
    plan = Plan(
        units=units,
        compute=compute,
        format=config.precision.format,
        grad=torch_dtype(config.precision.grad_dtype),
        weights=weights,
        state=state,
        tile_elements=_tile_elements(config, compute),
        staging_bytes=0,
        gathered_bytes=0,
        threads=threads,
        limit=config.zeroxide.host_memory,
        resident_before=resident,
        world=ranks.world,
        rank=ranks.rank,
        stage=config.zero.stage,
        transport=transport,
    )
    # Over ranks, each would rescale the rows that it looked up, and only those of its own shard would last.
    if not plan.keeps_edits or plan.world > 1:
        _refuse_edits(module)
    _place(plan, config)
    return plan


def _refuse_edits(module: nn.Module) -> None:
    for name, each in module.named_modules():
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.max_norm is not None:
            raise ModelError(
                f"{name} has max_norm = {each.max_norm}: it rescales its weight in place in forward, which other "
                "ranks' shards or weights that move know nothing of; only stages 0 to 2 on one rank allow that",
                name=name,
            )


def _transport(config: Config, ranks: Ranks) -> str:
    if config.zeroxide.transport == "shared_memory" and not ranks.shares_memory:
        raise ConfigError(
            'zeroxide.transport: "shared_memory" needs all ranks on one host, each allowed to open the others\' memory '
            'under /proc; use "auto"',
            path="zeroxide.transport",
            expected='"auto" or "collective"',
            got='"shared_memory"',
        )
    return "shared" if ranks.shares_memory and config.zeroxide.transport != "collective" else "collective"


def _by_trainable(unit: UnitPlan) -> list[UnitPlan]:
    """The unit's trainable and its frozen parameters as units of the same modules."""
    parts = [
        (unit.name, [entry for entry in unit.params if entry.trainable]),
        (f"{unit.name} (frozen)", [entry for entry in unit.params if not entry.trainable]),
    ]
    if not all(params for _, params in parts):
        return [unit]
    return [UnitPlan(name, unit.modules, params, unit.held_through_backward) for name, params in parts]


def check_model(module: nn.Module, entries: list[ParameterPlan], config: Config) -> None:
    """Refuses models that have nothing to train or parameters that cannot be laid out."""
    if not entries:
        raise ModelError(f"{type(module).__name__} has no parameters: there is nothing to train")
    if config.optimizer is not None and not any(entry.trainable for entry in entries):
        raise ModelError(
            f"every parameter of {type(module).__name__} is frozen: nothing to train; without an optimizer "
            "in the config it can be used for evaluation"
        )
    devices = Counter(entry.param.device.type for entry in entries)
    if len(devices) > 1:
        (first, _), (other, _) = devices.most_common(2)
        odd = next(entry for entry in entries if entry.param.device.type == other)
        raise ModelError(
            f"parameters are on two devices: {odd.name} is on {odd.param.device}, most others on {first}; "
            "move the model to one device first",
            name=odd.name,
        )
    for entry in entries:
        if handle_of(entry.param) is not None and slice_of(entry.param) is None:
            raise ModelError(
                f"{entry.name} belongs to an engine, or did at stage 3 until that was destroyed: build the model "
                "again, and load what engine.module_state_dict() or a checkpoint has kept",
                name=entry.name,
            )
        problem = why_not_bytes(entry.param)
        if problem is not None:
            raise ModelError(f"{entry.name} {problem}: parameters are dense tensors of numbers", name=entry.name)
        if entry.trainable and entry.param.dtype not in FLOATS:
            raise ModelError(
                f"{entry.name} is trained and has dtype {_dtype(entry.param.dtype)}: expected fp32, bf16 or fp16; "
                "cast it, or freeze it with requires_grad_(False): frozen parameters keep any dtype",
                name=entry.name,
            )
        if entry.param.device.type not in ("cpu", "meta"):
            raise ModelError(
                f"{entry.name} is on {entry.param.device}: this version computes in host memory; "
                "build the model on the CPU",
                name=entry.name,
            )
    check_sharing(entries)


def _tile_elements(config: Config, compute: torch.dtype) -> int:
    if config.zeroxide.tile_bytes is None:
        return DEFAULT_TILE_ELEMENTS
    return max(TILE_QUANTUM, config.zeroxide.tile_bytes // compute.itemsize // TILE_QUANTUM * TILE_QUANTUM)


def padded_sizes(unit: UnitPlan, world: int) -> tuple[int, int]:
    """(trainable, all) elements of a unit's flat layout, as the core pads them."""
    quantum = TILE_QUANTUM * world
    trainable = frozen = 0
    for entry in unit.params:
        # A part with a parameter has at least one element of padding, whatever the parameter has.
        size = max(1, -(-entry.words // 64) * 64)
        if entry.trainable:
            trainable += size
        else:
            frozen += size
    trainable = -(-trainable // quantum) * quantum
    return trainable, trainable + -(-frozen // quantum) * quantum


def _place(plan: Plan, config: Config) -> None:
    sizes = [padded_sizes(unit, plan.world) for unit in plan.units]
    outgoing = _outgoing(plan, [size for size, _ in sizes], config)
    trainable = sum(size for size, _ in sizes) // (1 if plan.replicated else plan.world)
    total = sum(size for _, size in sizes)
    weight = plan.compute.itemsize
    if plan.weights is not Home.HOST:
        plan.gathered_bytes = _gathered(plan, [size * weight for _, size in sizes], config.zeroxide.prefetch)
    if plan.weights is Home.DISK or plan.state is Home.DISK:
        longest = min(plan.tile_elements, max(size for _, size in sizes))
        tile = longest * (plan.state_bytes + weight)
        plan.staging_bytes = config.zeroxide.staging_bytes or max(DEFAULT_STAGING_BYTES, MIN_TILES_IN_RING * tile)
        if plan.staging_bytes < MIN_TILES_IN_RING * tile:
            raise BudgetError(
                f"zeroxide.staging_bytes is {plan.staging_bytes}: the ring needs {MIN_TILES_IN_RING * tile} bytes, "
                f"two tiles of {tile}; raise it or lower zeroxide.tile_bytes",
                need=MIN_TILES_IN_RING * tile,
                limit=plan.staging_bytes,
                bucket="staging",
            )
    plan.buckets = {
        "weights": {Home.HOST: total, Home.SHARD: total // plan.world, Home.DISK: 0}[plan.weights] * weight,
        "gradients": trainable * plan.grad.itemsize + outgoing,
        "optimizer": trainable * plan.state_bytes if plan.state is Home.HOST else 0,
        "staging": plan.staging_bytes,
        "gathered": plan.gathered_bytes,
    }
    if plan.limit is not None and plan.resident_before + plan.payload > plan.limit:
        short = plan.resident_before + plan.payload - plan.limit
        largest = max(plan.buckets, key=lambda name: plan.buckets[name])
        help_line = {
            "weights": "offload parameters to nvme",
            "optimizer": "offload the optimizer to nvme",
            "gradients": "keep gradients in bf16 (data_types.grad_accum_dtype) or train fewer parameters",
            "gathered": "lower zeroxide.unit_bytes or zeroxide.prefetch",
            "staging": "lower zeroxide.staging_bytes",
        }[largest]
        parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in plan.buckets.items() if size)
        raise BudgetError(
            f"host_memory {plan.limit / MIB:.0f} MiB is too small by {short / MIB:.0f} MiB: the process already uses "
            f"{plan.resident_before / MIB:.0f} and the state needs {plan.payload / MIB:.0f} ({parts}), before any "
            f"activation; to help: {help_line}",
            need=plan.resident_before + plan.payload,
            limit=plan.limit,
            bucket=largest,
        )


def _outgoing(plan: Plan, trainable: list[int], config: Config) -> int:
    """Room for gradients on their way to other ranks: units used all through backward, and a few others; without shared
    memory also for those of one unit that come in."""
    if plan.world == 1:
        return 0
    item = torch_dtype(config.precision.reduce_dtype).itemsize
    long = sum(size for size, unit in zip(trainable, plan.units, strict=True) if unit.held_through_backward)
    short = [size for size, unit in zip(trainable, plan.units, strict=True) if not unit.held_through_backward and size]
    incoming = 0
    if plan.transport == "collective":
        incoming = max(trainable, default=0) // (1 if plan.replicated else plan.world) * (plan.world - 1)
    return (long + min(SLOTS, len(short)) * max(short, default=0) + incoming) * item


def _gathered(plan: Plan, sizes: list[int], prefetch: int) -> int:
    """Frames for the units that are held at once: those held all along, and the largest others in a row.

    With several ranks, what is at home on disk is read before it is gathered ahead: one unit more.
    """
    frames = [-(-size // FRAME) * FRAME for size in sizes]
    held = sum(size for size, unit in zip(frames, plan.units, strict=True) if unit.held_through_backward)
    others = [size for size, unit in zip(frames, plan.units, strict=True) if not unit.held_through_backward]
    reading = plan.weights is Home.DISK and plan.world > 1 and prefetch > 0
    window = min(len(others), prefetch + 1 + reading)
    moving = max((sum(others[at : at + window]) for at in range(len(others) - window + 1)), default=0)
    if plan.world > 1:
        return held + moving
    # One operation may read weights of two units, wherever they are, and with one rank reads bring units back.
    return max(held + moving, sum(sorted(frames)[-2:]))
