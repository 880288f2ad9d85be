"""`zero_optimization`: stage, homes of parameters and optimizer state, and modules that are gathered whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from zeroxide.config.check import show
from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.fields import (
    BelowOne,
    Count,
    Directory,
    Flag,
    Fraction,
    NoEffect,
    NotBuilt,
    Removed,
    Section,
    choice,
    expecting,
    whole_of_text,
)
from zeroxide.config.given import Given, agree
from zeroxide.config.sections.gradients import Gradients
from zeroxide.errors import ConfigError

if TYPE_CHECKING:
    from zeroxide.config.shortcuts import Shortcuts

__all__ = [
    "ErrorFeedback",
    "LeafModule",
    "Offload",
    "OffloadOptimizer",
    "OffloadParam",
    "Zero",
    "ZeroSection",
    "resolve",
    "stage_of_switch",
]

Names = Annotated[list[str], expecting("a list of names")]
Device = Annotated[Literal["none", "cpu", "nvme"], choice("none", "cpu", "nvme")]

_BUFFERS = "transfer buffers come from one ring; see zeroxide.staging_bytes"
_BUCKETS = "a unit's gradients are reduced in one piece as they arrive"
_UNITS = "memory for gathered weights is budgeted in bytes; see zeroxide.host_memory"
_PINNED = "registration with a device follows from the device, in exact bytes"
_SHARD_GROUPS = 'remove the key, and set "zeroxide.mesh.dp_shard" to the ranks in a group'
_PIPELINE = "reading, computing and writing always overlap"


class OffloadParam(Section):
    """`zero_optimization.offload_param`: where the weights live between uses."""

    device: Device = "none"
    """Where the weights live."""
    nvme_path: Directory | None = None
    """The directory, where that is "nvme"."""
    buffer_count: Annotated[Any, NoEffect(_BUFFERS)] = None
    buffer_size: Annotated[Any, NoEffect(_BUFFERS)] = None
    max_in_cpu: Annotated[Any, NoEffect(_UNITS)] = None
    pin_memory: Annotated[Flag | None, NoEffect(_PINNED)] = None


class OffloadOptimizer(Section):
    """`zero_optimization.offload_optimizer`: where master weights and moments live."""

    device: Device = "none"
    """Where master weights and moments live."""
    nvme_path: Directory | None = None
    """The directory, where that is "nvme"."""
    buffer_count: Annotated[Any, NoEffect(_BUFFERS)] = None
    buffer_size: Annotated[Any, NoEffect(_BUFFERS)] = None
    pin_memory: Annotated[Flag | None, NoEffect(_PINNED)] = None
    pipeline: Annotated[Any, NoEffect(_PIPELINE)] = None
    pipeline_read: Annotated[Flag | None, NoEffect(_PIPELINE)] = None
    pipeline_write: Annotated[Flag | None, NoEffect(_PIPELINE)] = None
    fast_init: Annotated[Flag | None, NoEffect("state is laid out once, in place")] = None
    cpuadam_cores_perc: Annotated[Any, NoEffect("see zeroxide.threads")] = None
    ratio: Fraction | None = None
    """The share of the parameters that the CPU updates where device is "cpu"; a GPU updates the rest."""
    super_offload: Annotated[Flag | None, NotBuilt("super offload")] = None


class LeafModule(Section):
    """`zero_optimization.leaf_module`: modules that are gathered whole."""

    classes: Names | None = None
    """Classes of modules that are gathered whole, as "Name" or "module.path.Name"."""
    names: Names | None = None
    """Full names of such modules."""
    name_suffixes: Names | None = None
    """What names of such modules end in."""


class LocoParam(Section):
    """`zero_optimization.zeropp_loco_param`: error feedback for quantized gradients."""

    err_beta: BelowOne | None = None
    """Weight of what was kept before, beside what is lost now."""
    reset_T: Count | None = None
    """Optimizer steps after which what was kept is forgotten."""


class ZeroSection(Section):
    """`zero_optimization`."""

    stage: Annotated[int, Field(ge=0, le=3), BeforeValidator(whole_of_text), expecting("0, 1, 2 or 3")] | None = None
    """What is sharded over ranks: nothing, optimizer state, gradients too, weights too."""
    compute_grad_norm: Flag = True
    """Whether the global gradient norm is told to those who ask."""
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    cpu_offload: Flag | None = None
    """As `offload_optimizer.device` = "cpu"."""
    cpu_offload_param: Flag | None = None
    """As `offload_param.device` = "cpu"."""
    zero_hpz_partition_size: Count | None = None
    """Ranks in a group that gathers weights within itself; must divide the ranks."""
    zero_quantized_weights: Flag = False
    """Whether all weights travel as int8."""
    zero_quantized_nontrainable_weights: Flag = False
    """Whether weights that are not trained travel as int8."""
    zero_quantized_gradients: Flag = False
    """Whether gradients travel as int4."""
    zeropp_loco_param: LocoParam | None = None

    cpu_offload_use_pin_memory: Annotated[Any, NoEffect(_PINNED)] = None
    overlap_comm: Annotated[Flag | None, NoEffect("when to communicate is not left to a switch")] = None
    contiguous_gradients: Annotated[Flag | None, NoEffect("gradients are always accumulated in one flat buffer")] = None
    reduce_scatter: Annotated[Flag | None, NoEffect("gradients are always reduce-scattered")] = None
    reduce_bucket_size: Annotated[Any, NoEffect(_BUCKETS)] = None
    use_multi_rank_bucket_allreduce: Annotated[Any, NoEffect(_BUCKETS)] = None
    allgather_partitions: Annotated[Flag | None, NoEffect("a unit is gathered by one collective")] = None
    allgather_bucket_size: Annotated[Any, NoEffect("a unit is gathered by one collective")] = None
    round_robin_gradients: Annotated[Flag | None, NoEffect("shards are contiguous slices of a unit")] = None
    load_from_fp32_weights: Annotated[Flag | None, NoEffect("exact weights are always in the checkpoint")] = None
    elastic_checkpoint: Annotated[Flag | None, NoEffect("checkpoints do not depend on the world size")] = None
    legacy_stage1: Annotated[Any, NoEffect("there is one implementation of stage 1")] = None
    ignore_unused_parameters: Annotated[Flag | None, NoEffect("unused parameters are left out of the step")] = None
    grad_hooks: Annotated[Any, NoEffect("gradients are taken as they arrive")] = None
    sub_group_size: Annotated[Any, NoEffect("the step streams tiles; see zeroxide.tile_bytes")] = None
    stage3_prefetch_bucket_size: Annotated[Any, NoEffect("see zeroxide.prefetch")] = None
    stage3_param_persistence_threshold: Annotated[Any, NoEffect("small parameters travel with their unit")] = None
    stage3_model_persistence_threshold: Annotated[Any, NoEffect("small parameters travel with their unit")] = None
    stage3_max_live_parameters: Annotated[Any, NoEffect(_UNITS)] = None
    stage3_max_reuse_distance: Annotated[Any, NoEffect(_UNITS)] = None
    stage3_gather_16bit_weights_on_model_save: Annotated[
        Flag | None, NoEffect("save_16bit_model streams the weights, gathered one unit at a time")
    ] = None
    stage3_gather_fp16_weights_on_model_save: Annotated[
        Flag | None, NoEffect("save_16bit_model streams the weights, gathered one unit at a time")
    ] = None
    stage3_module_granularity_threshold: Annotated[Any, NoEffect("see zeroxide.unit_bytes")] = None
    stage3_use_all_reduce_for_fetch_params: Annotated[Any, NoEffect("a unit is gathered by one collective")] = None
    stage3_allgather_sequential: Annotated[Any, NoEffect("a unit is gathered by one collective")] = None
    leaf_module: LeafModule | None = None
    parameter_alignment: Annotated[Any, NoEffect("every parameter begins at a multiple of 64 elements")] = None
    memory_efficient_linear: Annotated[Any, NoEffect("no function of torch is replaced")] = None
    override_module_apply: Annotated[Any, NoEffect("no function of torch is replaced")] = None
    pipeline_loading_checkpoint: Annotated[Any, NoEffect("checkpoints are always loaded as a stream")] = None
    log_trace_cache_warnings: Annotated[Any, NoEffect("there is no trace to invalidate")] = None
    enable_sanity_checks: Annotated[Any, NoEffect("every change of state is always checked")] = None
    save_muon_momentum_buffer_in_memory: Annotated[Any, NoEffect("Muon is not built yet")] = None

    zenflow: Annotated[Any, NotBuilt("ZenFlow")] = None
    mics_shard_size: Annotated[Any, Removed("MiCS sharding groups", neutral=(-1,), instead=_SHARD_GROUPS)] = None
    mics_hierarchical_params_gather: Annotated[Any, Removed("MiCS sharding groups", instead=_SHARD_GROUPS)] = None


def stage_of_switch(value: Any) -> Any:
    """`"zero_optimization": true` is stage 1 and false none, the oldest way to write the section."""
    return {"stage": 1 if value else 0} if isinstance(value, bool) else value


@dataclass(frozen=True, slots=True)
class Offload:
    """The home of one kind of state. `path` is the directory on disk, and is set exactly when `kind` is "nvme"."""

    kind: Literal["none", "cpu", "nvme"] = "none"
    path: Path | None = field(default=None, metadata=may_differ("each host has its own disks"))

    @property
    def enabled(self) -> bool:
        """Whether the state lives somewhere else than on the compute device."""
        return self.kind != "none"

    def __str__(self) -> str:
        return f"nvme:{self.path}" if self.kind == "nvme" else self.kind


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What quantizing gradients loses is kept and added to the next ones."""

    beta: float = 0.8
    """Weight of what was kept before, from 0 to below 1, beside what is lost now."""
    reset_steps: int = 1024
    """Optimizer steps after which what was kept is forgotten."""


@dataclass(frozen=True)
class Zero(Resolved):
    """Sharding and offload."""

    key: ClassVar[str] = "zero_optimization"

    stage: int = 0
    """ZeRO stage, 0 to 3."""
    offload_param: Offload = field(default_factory=Offload)
    offload_optimizer: Offload = field(default_factory=Offload)
    cpu_share: float = 1.0
    """What share of the parameters the CPU updates where `offload_optimizer` is "cpu"; the device updates the rest."""
    leaf_classes: tuple[str, ...] = ()
    """Classes of modules that are gathered whole, as "Name" or "module.path.Name"."""
    leaf_names: tuple[str, ...] = ()
    """Full names of modules that are gathered whole."""
    leaf_suffixes: tuple[str, ...] = ()
    """What names of modules that are gathered whole end in."""
    compute_grad_norm: bool = True
    """Whether the global gradient norm is told to those who ask."""
    quantized_weights: bool = False
    """Whether all weights travel as int8."""
    quantized_frozen: bool = False
    """Whether weights that are not trained do."""
    quantized_gradients: bool = False
    """Whether gradients travel as int4."""
    feedback: ErrorFeedback | None = None
    secondary: int = 0
    """Ranks in a group that keeps codes of all weights for its own members, where weights travel as int8; 0 for all."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        said: dict[str, Any] = {
            "stage": self.stage,
            **_home_written("offload_param", self.offload_param),
            **_home_written("offload_optimizer", self.offload_optimizer),
            "offload_optimizer.ratio": self.cpu_share,
            "compute_grad_norm": self.compute_grad_norm,
            "leaf_module.classes": list(self.leaf_classes),
            "leaf_module.names": list(self.leaf_names),
            "leaf_module.name_suffixes": list(self.leaf_suffixes),
            "zero_hpz_partition_size": self.secondary or 1,
            "zero_quantized_weights": self.quantized_weights,
            "zero_quantized_nontrainable_weights": self.quantized_frozen,
            "zero_quantized_gradients": self.quantized_gradients,
        }
        if self.feedback is not None:
            said["zeropp_loco_param.err_beta"] = self.feedback.beta
            said["zeropp_loco_param.reset_T"] = self.feedback.reset_steps
        return {f"{self.key}.{name}": value for name, value in said.items()}


def _home_written(name: str, home: Offload) -> dict[str, Any]:
    path = {} if home.path is None else {f"{name}.nvme_path": str(home.path)}
    return {f"{name}.device": home.kind, **path}


def resolve(section: ZeroSection | None, gradients: Gradients, given: Given) -> Zero:
    """Sharding and offload. Raises ConfigError where stage, homes and shortcuts contradict one another."""
    section = section or ZeroSection()
    stage, offload_param, offload_optimizer = _homes(section, given.shortcuts)
    _check_quantized(section, stage, offload_param)
    leaf = section.leaf_module or LeafModule()
    return Zero(
        stage=stage,
        offload_param=offload_param,
        offload_optimizer=offload_optimizer,
        cpu_share=_cpu_share(section, offload_optimizer),
        leaf_classes=tuple(leaf.classes or ()),
        leaf_names=tuple(leaf.names or ()),
        leaf_suffixes=tuple(leaf.name_suffixes or ()),
        compute_grad_norm=_compute_norm(section, stage, gradients),
        quantized_weights=section.zero_quantized_weights,
        quantized_frozen=section.zero_quantized_nontrainable_weights,
        quantized_gradients=section.zero_quantized_gradients,
        feedback=_feedback(section),
        secondary=secondary_of(section),
    )


def _homes(given: ZeroSection, shortcuts: Shortcuts) -> tuple[int, Offload, Offload]:
    """Return the stage and the homes of parameters and of optimizer state.

    The stage follows from the shortcuts alone when the config names none.
    """
    base = "zero_optimization"
    param, param_key = _configured_home(
        given.offload_param, f"{base}.offload_param", given.cpu_offload_param, f"{base}.cpu_offload_param"
    )
    state, state_key = _configured_home(
        given.offload_optimizer, f"{base}.offload_optimizer", given.cpu_offload, f"{base}.cpu_offload"
    )
    stage = given.stage
    for home, key, least in ((param, param_key, 3), (state, state_key, 1)):
        if home is not None and home.enabled and (stage or 0) < least:
            asked = f"{base}.stage {least}" + ("" if least == 3 else " or more")
            raise ConfigError(
                f"{key} = {show(home.kind)} needs {asked}, got {'none' if stage is None else stage}",
                path=f"{base}.stage",
                expected=str(least),
                got=show(stage),
            )

    def chosen(keyword: str, own: Offload | None, key: str, configured: Offload | None, least: int) -> Offload:
        name, wanted = (keyword, own) if own is not None else ("offload", shortcuts.offload)
        if wanted is not None and wanted.enabled and stage is not None and stage < least:
            raise ConfigError(
                f'{name}="{wanted}" needs stage {least}{"" if least == 3 else " or more"} and contradicts '
                f"{base}.stage = {stage} in the config",
                path=f"{base}.stage",
                expected=str(least),
                got=str(stage),
            )
        return agree(name, wanted, key, configured) or Offload()

    home_param = chosen("offload_param", shortcuts.offload_param, param_key, param, 3)
    home_state = chosen("offload_optimizer", shortcuts.offload_optimizer, state_key, state, 1)
    if stage is None:
        stage = 3 if home_param.enabled or home_state.enabled else 0
    return stage, home_param, home_state


def _cpu_share(section: ZeroSection, home: Offload) -> float:
    """What `ratio` says. Raises ConfigError where there is nothing to be shared between a CPU and a device."""
    ratio = None if section.offload_optimizer is None else section.offload_optimizer.ratio
    if ratio is None or ratio == 1 or home.kind == "cpu":
        return 1.0 if ratio is None else ratio
    path = "zero_optimization.offload_optimizer.ratio"
    raise ConfigError(
        f'{path} = {show(ratio)} needs offload_optimizer.device "cpu", got "{home.kind}": it is the share of '
        "parameters that the CPU updates, with their state in host memory",
        path=path,
        expected="1",
        got=show(ratio),
    )


def _compute_norm(section: ZeroSection, stage: int, gradients: Gradients) -> bool:
    """Whether the norm is told. Leaving it out has DeepSpeed's conditions, so that a config means the same there."""
    if section.compute_grad_norm:
        return True
    key = "zero_optimization.compute_grad_norm"
    if stage not in (1, 2):
        raise ConfigError(f"{key} = false needs zero_optimization.stage 1 or 2, got {stage}", path=key)
    if gradients.clipping is not None:
        shown = "1.0, the default" if gradients.clipping_is_default else show(gradients.clipping)
        raise ConfigError(f"{key} = false needs gradient_clipping = 0, got {shown}", path=key)
    return False


def secondary_of(section: ZeroSection | None) -> int:
    """Ranks in a group of the secondary partition, 0 without one: with all weights as int8 `zero_hpz_partition_size` is
    that, and otherwise the ranks of a shard group (see the mesh)."""
    if section is None or not section.zero_quantized_weights:
        return 0
    size = section.zero_hpz_partition_size or 0
    return size if size > 1 else 0


def _check_quantized(section: ZeroSection, stage: int, offload_param: Offload) -> None:
    """Raises ConfigError where quantized collectives are asked for and nothing of that kind is sent."""
    asked = {
        "zero_quantized_weights": section.zero_quantized_weights,
        "zero_quantized_nontrainable_weights": section.zero_quantized_nontrainable_weights,
        "zero_quantized_gradients": section.zero_quantized_gradients,
    }
    for key, wanted in asked.items():
        path = f"zero_optimization.{key}"
        if wanted and stage < 3:
            raise ConfigError(
                f"{path} = true needs zero_optimization.stage 3, got {stage}",
                path=path,
                expected="false",
                got="true",
            )
        if wanted and "weights" in key and offload_param.kind == "nvme":
            raise ConfigError(
                f'{path} = true with zero_optimization.offload_param.device = "nvme": not built yet; keep the '
                'weights in memory (device "cpu" or "none")',
                path=path,
                expected="false",
                got="true",
            )


def _feedback(section: ZeroSection) -> ErrorFeedback | None:
    loco = section.zeropp_loco_param
    if loco is None:
        return None
    if not section.zero_quantized_gradients:
        path = "zero_optimization.zeropp_loco_param"
        raise ConfigError(
            f"{path} needs zero_optimization.zero_quantized_gradients = true: without it gradients lose nothing",
            path=path,
        )
    given = {"beta": loco.err_beta, "reset_steps": loco.reset_T}
    return ErrorFeedback(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _home(section: OffloadParam | OffloadOptimizer, path: str) -> Offload:
    if section.device == "nvme" and section.nvme_path is None:
        raise ConfigError(
            f'{path}.nvme_path: required when {path}.device is "nvme"',
            path=f"{path}.nvme_path",
            expected="the path of a directory",
        )
    return Offload(section.device, section.nvme_path if section.device == "nvme" else None)


def _configured_home(
    section: OffloadParam | OffloadOptimizer | None, path: str, legacy: bool | None, legacy_path: str
) -> tuple[Offload | None, str]:
    """Return what the config says of one kind of state, `None` where it is silent, and the key that says it."""
    home = None if section is None else _home(section, path)
    if legacy and home is not None and home.kind != "cpu":
        raise ConfigError(f'{legacy_path} = true contradicts {path}.device = "{home.kind}"', path=legacy_path)
    if legacy and home is None:
        return Offload("cpu"), legacy_path
    return home, f"{path}.device"
