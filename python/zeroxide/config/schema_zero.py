"""`zero_optimization`: sharding and offload."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from zeroxide.config.fields import (
    Directory,
    Flag,
    NoEffect,
    NotBuilt,
    Removed,
    Section,
    choice,
    expecting,
    whole_of_text,
)

__all__ = ["LeafModule", "OffloadOptimizer", "OffloadParam", "ZeroOptimization", "stage_of_switch"]

Names = Annotated[list[str], expecting("a list of names")]
Device = Annotated[Literal["none", "cpu", "nvme"], choice("none", "cpu", "nvme")]

_BUFFERS = "transfer buffers come from one ring; see zeroxide.staging_bytes"
_BUCKETS = "a unit's gradients are reduced in one piece as they arrive"
_UNITS = "memory for gathered weights is budgeted in bytes; see zeroxide.host_memory"
_PINNED = "registration with a device follows from the device, in exact bytes"
_PIPELINE = "reading, computing and writing always overlap"


class OffloadParam(Section):
    """`zero_optimization.offload_param`: where the weights live between uses."""

    device: Device = "none"
    nvme_path: Directory | None = None
    buffer_count: Annotated[Any, NoEffect(_BUFFERS)] = None
    buffer_size: Annotated[Any, NoEffect(_BUFFERS)] = None
    max_in_cpu: Annotated[Any, NoEffect(_UNITS)] = None
    pin_memory: Annotated[Flag | None, NoEffect(_PINNED)] = None


class OffloadOptimizer(Section):
    """`zero_optimization.offload_optimizer`: where master weights and moments live."""

    device: Device = "none"
    nvme_path: Directory | None = None
    buffer_count: Annotated[Any, NoEffect(_BUFFERS)] = None
    buffer_size: Annotated[Any, NoEffect(_BUFFERS)] = None
    pin_memory: Annotated[Flag | None, NoEffect(_PINNED)] = None
    pipeline: Annotated[Any, NoEffect(_PIPELINE)] = None
    pipeline_read: Annotated[Flag | None, NoEffect(_PIPELINE)] = None
    pipeline_write: Annotated[Flag | None, NoEffect(_PIPELINE)] = None
    fast_init: Annotated[Flag | None, NoEffect("state is laid out once, in place")] = None
    cpuadam_cores_perc: Annotated[Any, NoEffect("see zeroxide.threads")] = None
    ratio: Annotated[Any, NotBuilt("splitting the optimizer between devices", neutral=(1,))] = None
    super_offload: Annotated[Flag | None, NotBuilt("super offload")] = None


class LeafModule(Section):
    """`zero_optimization.leaf_module`: modules that are gathered whole."""

    classes: Names | None = None
    names: Names | None = None
    name_suffixes: Names | None = None


class ZeroOptimization(Section):
    """`zero_optimization`."""

    stage: Annotated[int, Field(ge=0, le=3), BeforeValidator(whole_of_text), expecting("0, 1, 2 or 3")] | None = None
    compute_grad_norm: Flag = True
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    cpu_offload: Flag | None = None
    cpu_offload_param: Flag | None = None

    cpu_offload_use_pin_memory: Annotated[Any, NoEffect(_PINNED)] = None
    overlap_comm: Annotated[Flag | None, NoEffect("when to communicate is not left to a switch")] = None
    contiguous_gradients: Annotated[Flag | None, NoEffect("gradients always land in one flat buffer")] = None
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
    zero_hpz_partition_size: Annotated[Any, NotBuilt("secondary shards", neutral=(1,))] = None
    zero_quantized_weights: Annotated[Any, NotBuilt("quantized collectives")] = None
    zero_quantized_nontrainable_weights: Annotated[Any, NotBuilt("quantized collectives")] = None
    zero_quantized_gradients: Annotated[Any, NotBuilt("quantized collectives")] = None
    zeropp_loco_param: Annotated[Any, Removed("LoCo error feedback")] = None
    mics_shard_size: Annotated[Any, Removed("MiCS sharding groups", neutral=(-1,))] = None
    mics_hierarchical_params_gather: Annotated[Any, Removed("MiCS sharding groups")] = None


def stage_of_switch(value: Any) -> Any:
    """`"zero_optimization": true` is stage 1 and false none, the oldest way to write the section."""
    return {"stage": 1 if value else 0} if isinstance(value, bool) else value
