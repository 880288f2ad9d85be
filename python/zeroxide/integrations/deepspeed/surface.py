"""The names that `deepspeed` has here, module by module: where each lives, or what it is and that it is not built.

They are those that Hugging Face's libraries, Lightning, axolotl, LLaMA-Factory, ms-swift and OpenRLHF use of it, and
those that scripts for it are written with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["NAME", "PUBLIC", "SURFACE", "VERSION", "Unbuilt"]

NAME = "deepspeed"
PUBLIC = "0.19.8"
"""The release whose names, defaults and config keys these are."""
VERSION = f"{PUBLIC}+zeroxide"
"""What libraries that compare versions see; the local part tells who answers."""
COMMIT = "zeroxide"
"""What stands where DeepSpeed names the commit that it was built from."""


@dataclass(frozen=True)
class Unbuilt:
    """A name that DeepSpeed has."""

    line: str
    """What it is, that it is not there, and what to do."""


def _later(feature: str) -> Unbuilt:
    return Unbuilt(f"{feature} is not built in zeroxide yet")


_HERE = "zeroxide.integrations.deepspeed"
_ENGINE = "zeroxide.engine.engine:Engine"
_ACCELERATOR = f"{_HERE}.accelerator:get_accelerator"
_STATUS = "zeroxide.zero:ZeroParamStatus"
_CPU_ADAM = "zeroxide.optim:DeepSpeedCPUAdam"
_CPU_LION = "zeroxide.optim:DeepSpeedCPULion"
_CPU_ADAGRAD = "zeroxide.optim:DeepSpeedCPUAdagrad"
_INIT_DISTRIBUTED = "zeroxide.distributed:init_distributed"
_LOGGER = f"{_HERE}.logging:logger"
_LOG_DIST = f"{_HERE}.logging:log_dist"
_LAYERS = {name: f"zeroxide.parallel.pipe:{name}" for name in ("LayerSpec", "PipelineModule", "TiedLayerSpec")}
_TOPOLOGY = {
    name: f"zeroxide.parallel.pipe:{name}"
    for name in (
        "PipeDataParallelTopology",
        "PipeModelDataParallelTopology",
        "PipelineParallelGrid",
        "ProcessTopology",
    )
}
_PIPELINE_ERROR = {"PipelineError": "zeroxide.errors:PipelineError"}
_SEQUENCE = "zeroxide.parallel.sequence"
_OTHER_MLP = Unbuilt("AutogradComputeMLP is TiledMLP for tests of it: use TiledMLP")
_WHICH = ("data", "sequence", "sequence_data")
_INFERENCE = f"{_HERE}.inference:InferenceEngine"
_BUILDERS = {
    name: f"{_HERE}.op_builder:{name}"
    for name in (
        "AsyncIOBuilder",
        "CPUAdagradBuilder",
        "CPUAdamBuilder",
        "CPULionBuilder",
        "DeepCompileBuilder",
        "EvoformerAttnBuilder",
        "FPQuantizerBuilder",
        "FusedAdamBuilder",
        "FusedLambBuilder",
        "FusedLionBuilder",
        "GDSBuilder",
        "InferenceBuilder",
        "InferenceCoreBuilder",
        "InferenceCutlassBuilder",
        "QuantizerBuilder",
        "RaggedOpsBuilder",
        "RaggedUtilsBuilder",
        "RandomLTDBuilder",
        "SpatialInferenceBuilder",
        "StochasticTransformerBuilder",
        "TransformerBuilder",
        "UtilsBuilder",
    )
}
_LEAVES = {
    name: f"zeroxide.zero:{name}"
    for name in (
        "get_z3_leaf_modules",
        "set_z3_leaf_module",
        "set_z3_leaf_modules",
        "set_z3_leaf_modules_by_name",
        "set_z3_leaf_modules_by_suffix",
        "unset_z3_leaf_modules",
        "unset_z3_leaf_modules_by_name",
        "unset_z3_leaf_modules_by_suffix",
        "z3_leaf_module",
        "z3_leaf_parameter",
    )
}
_SAFE = {
    f"safe_{verb}_{which}_{what}": f"zeroxide.zero:safe_{verb}_{which}_{what}"
    for verb in ("get", "set")
    for which in ("full", "local")
    for what in ("fp32_param", "grad", "optimizer_state")
}
_ZERO = {
    "GatheredParameters": "zeroxide.zero:GatheredParameters",
    "Init": f"{_HERE}.entry:Init",
    "register_external_parameter": "zeroxide.zero:register_external_parameter",
}
_SCHEDULES = {
    name: f"zeroxide.optim.schedules:{name}"
    for name in ("LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR")
}
_GATES = {name: f"zeroxide.moe:{name}" for name in ("MOELayer", "TopKGate")}
_DISTRIBUTED = {
    name: f"torch.distributed:{name}"
    for name in (
        "ReduceOp",
        "all_gather_object",
        "broadcast_object_list",
        "destroy_process_group",
        "is_available",
        "is_initialized",
        "new_group",
    )
}
_PROFILER = {
    **{name: f"zeroxide.profiling:{name}" for name in ("FlopsProfiler", "get_model_profile")},
    **{
        f"{what}_to_string": f"zeroxide.profiling.numbers:{what}_to_string"
        for what in ("duration", "flops", "macs", "number", "params")
    },
}
_RANKS = {
    name: f"{_HERE}.comm:{name}"
    for name in (
        "all_gather",
        "all_gather_into_tensor",
        "all_reduce",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "gather",
        "get_global_rank",
        "get_local_rank",
        "get_rank",
        "get_world_size",
        "irecv",
        "isend",
        "recv",
        "reduce",
        "reduce_scatter_tensor",
        "scatter",
        "send",
    )
}
_RANKS |= {name: f"zeroxide.distributed.comms_summary:{name}" for name in ("configure", "log_summary")}

SURFACE: Mapping[str, Mapping[str, str | Unbuilt]] = {
    "deepspeed": {
        "__version__": f"{_HERE}.surface:VERSION",
        "__version_major__": f"{_HERE}.version:MAJOR",
        "__version_minor__": f"{_HERE}.version:MINOR",
        "__version_patch__": f"{_HERE}.version:PATCH",
        "__git_hash__": f"{_HERE}.surface:COMMIT",
        "version": f"{_HERE}.surface:VERSION",
        "add_config_arguments": "zeroxide.config.arguments:add_config_arguments",
        "add_tuning_arguments": _later("autotuning"),
        "DeepSpeedEngine": _ENGINE,
        "dist": f"{_HERE}.comm",
        "get_accelerator": _ACCELERATOR,
        "init_distributed": _INIT_DISTRIBUTED,
        "init_inference": f"{_HERE}.inference:init_inference",
        "initialize": f"{_HERE}.entry:initialize",
        "logger": _LOGGER,
        "log_dist": _LOG_DIST,
        "OnDevice": _later("OnDevice (zero.Init builds models in slices)"),
        "PipelineModule": _LAYERS["PipelineModule"],
        "tp_model_init": "zeroxide.engine.tp_model_init:tp_model_init",
        "DeepSpeedHybridEngine": _later("the hybrid engine"),
        "InferenceEngine": _INFERENCE,
    },
    "deepspeed.accelerator": {"get_accelerator": _ACCELERATOR},
    "deepspeed.checkpoint": {},
    "deepspeed.checkpoint.utils": {"clone_tensors_for_torch_save": f"{_HERE}.tensors:clone_tensors_for_torch_save"},
    "deepspeed.checkpointing": {
        "checkpoint": f"{_HERE}.checkpointing:checkpoint",
        "configure": f"{_HERE}.checkpointing:configure",
        "is_configured": f"{_HERE}.checkpointing:is_configured",
        "non_reentrant_checkpoint": f"{_HERE}.checkpointing:checkpoint",
        "reset": f"{_HERE}.checkpointing:reset",
    },
    "deepspeed.comm": {"init_distributed": _INIT_DISTRIBUTED, **_DISTRIBUTED, **_RANKS},
    "deepspeed.comm.comm": {"init_distributed": _INIT_DISTRIBUTED, **_DISTRIBUTED, **_RANKS},
    "deepspeed.elasticity": {
        "compute_elastic_config": f"{_HERE}.elasticity:compute_elastic_config",
        "elasticity_enabled": f"{_HERE}.elasticity:elasticity_enabled",
    },
    "deepspeed.env_report": {"op_report": f"{_HERE}.op_builder:op_report"},
    "deepspeed.git_version_info": {"version": f"{_HERE}.surface:VERSION", "git_hash": f"{_HERE}.surface:COMMIT"},
    "deepspeed.launcher": {},
    "deepspeed.launcher.runner": {
        "DEEPSPEED_ENVIRONMENT_NAME": f"{_HERE}.version:ENVIRONMENT_FILE",
        "main": Unbuilt("zeroxide has no launcher of its own: start ranks by `zeroxide run torchrun ...`"),
    },
    "deepspeed.module_inject": {},
    "deepspeed.module_inject.autotp_config": {"TPLayerSpec": "zeroxide.config:TPLayerSpec"},
    "deepspeed.module_inject.layers": {"GatherReplacedLayerParams": f"{_HERE}.gathering:GatherReplacedLayerParams"},
    "deepspeed.moe": {"MoE": "zeroxide.moe:MoE"},
    "deepspeed.moe.experts": {"Experts": "zeroxide.moe:Experts"},
    "deepspeed.moe.layer": {"MoE": "zeroxide.moe:MoE", "Experts": "zeroxide.moe:Experts", **_GATES},
    "deepspeed.moe.sharded_moe": _GATES,
    "deepspeed.moe.utils": {
        name: f"zeroxide.moe.parameters:{name}"
        for name in (
            "configure_moe_param_groups",
            "has_moe_layers",
            "is_moe_param",
            "is_moe_param_group",
            "split_params_grads_into_shared_and_expert_params",
            "split_params_into_different_moe_groups_for_optimizer",
            "split_params_into_shared_and_expert_params",
        )
    },
    "deepspeed.monitor": {},
    "deepspeed.monitor.config": {"get_monitor_config": f"{_HERE}.monitor:get_monitor_config"},
    "deepspeed.monitor.monitor": {"MonitorMaster": f"{_HERE}.monitor:MonitorMaster"},
    "deepspeed.ops": {"__compatible_ops__": f"{_HERE}.op_builder:COMPATIBLE"},
    "deepspeed.ops.adagrad": {"DeepSpeedCPUAdagrad": _CPU_ADAGRAD},
    "deepspeed.ops.adam": {"DeepSpeedCPUAdam": _CPU_ADAM, "FusedAdam": f"{_HERE}.fused:FusedAdam"},
    "deepspeed.ops.aio": {"AsyncIOBuilder": _BUILDERS["AsyncIOBuilder"]},
    "deepspeed.ops.lion": {"DeepSpeedCPULion": _CPU_LION, "FusedLion": f"{_HERE}.fused:FusedLion"},
    "deepspeed.ops.op_builder": {**_BUILDERS, "OpBuilder": f"{_HERE}.op_builder:OpBuilder"},
    "deepspeed.ops.op_builder.all_ops": {"ALL_OPS": f"{_HERE}.op_builder:ALL_OPS"},
    "deepspeed.ops.op_builder.builder": {"OpBuilder": f"{_HERE}.op_builder:OpBuilder"},
    "deepspeed.pipe": _LAYERS,
    "deepspeed.profiling": {},
    "deepspeed.profiling.flops_profiler": _PROFILER,
    "deepspeed.profiling.flops_profiler.profiler": _PROFILER,
    "deepspeed.runtime": {},
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": {
        "checkpoint": f"{_HERE}.checkpointing:checkpoint",
        "non_reentrant_checkpoint": f"{_HERE}.checkpointing:checkpoint",
    },
    "deepspeed.runtime.base_optimizer": {
        "DeepSpeedOptimizer": "zeroxide.engine.optimizer:EngineOptimizer",
        "ZeROOptimizer": "zeroxide.engine.optimizer:EngineOptimizer",
    },
    "deepspeed.runtime.config": {"DeepSpeedConfig": f"{_HERE}.config:DeepSpeedConfig"},
    "deepspeed.runtime.engine": {"DeepSpeedEngine": _ENGINE},
    "deepspeed.runtime.lr_schedules": {
        **_SCHEDULES,
        "VALID_LR_SCHEDULES": f"{_HERE}.version:VALID_LR_SCHEDULES",
        "LR_RANGE_TEST": f"{_HERE}.version:LR_RANGE_TEST",
        "ONE_CYCLE": f"{_HERE}.version:ONE_CYCLE",
        "WARMUP_COSINE_LR": f"{_HERE}.version:WARMUP_COSINE_LR",
        "WARMUP_DECAY_LR": f"{_HERE}.version:WARMUP_DECAY_LR",
        "WARMUP_LR": f"{_HERE}.version:WARMUP_LR",
    },
    "deepspeed.runtime.pipe": {**_LAYERS, "ProcessTopology": _TOPOLOGY["ProcessTopology"]},
    "deepspeed.runtime.pipe.engine": {
        "PipelineEngine": "zeroxide.engine.pipeline.engine:PipelineEngine",
        **_PIPELINE_ERROR,
    },
    "deepspeed.runtime.pipe.module": {**_LAYERS, **_PIPELINE_ERROR},
    "deepspeed.runtime.pipe.topology": _TOPOLOGY,
    "deepspeed.runtime.chunked_cross_entropy": {"chunked_cross_entropy": "zeroxide.losses:chunked_cross_entropy"},
    "deepspeed.runtime.sequence_parallel": {},
    "deepspeed.runtime.sequence_parallel.parallel_state_sp": {
        name: f"{_SEQUENCE}.parallel_state:{name}"
        for name in (
            "initialize_sequence_parallel",
            *(f"get_{which}_parallel_{what}" for which in _WHICH for what in ("group", "rank", "world_size")),
        )
    },
    "deepspeed.runtime.sequence_parallel.ulysses_sp": {
        **{
            name: f"{_SEQUENCE}:{name}"
            for name in (
                "SequenceTiledCompute",
                "TiledFusedLogitsLoss",
                "TiledMLP",
                "UlyssesSPAttentionHF",
                "UlyssesSPDataLoaderAdapter",
                "sequence_tiled_compute",
            )
        },
        "AutogradComputeMLP": _OTHER_MLP,
    },
    "deepspeed.runtime.utils": {
        "move_to_device": f"{_HERE}.tensors:move_to_device",
        "see_memory_usage": f"{_HERE}.logging:see_memory_usage",
    },
    "deepspeed.runtime.zero": {},
    "deepspeed.runtime.zero.stage3": {
        name: f"{_HERE}.estimates:{name}"
        for name in (
            "estimate_zero3_model_states_mem_needs_all_cold",
            "estimate_zero3_model_states_mem_needs_all_live",
            "model_to_params",
        )
    },
    "deepspeed.runtime.zero.stage_1_and_2": {
        name: f"{_HERE}.estimates:{name}"
        for name in (
            "estimate_zero2_model_states_mem_needs_all_cold",
            "estimate_zero2_model_states_mem_needs_all_live",
            "model_to_params",
        )
    },
    "deepspeed.runtime.zero.config": {
        "OffloadDeviceEnum": f"{_HERE}.offload_states:OffloadDeviceEnum",
        "ZeroStageEnum": f"{_HERE}.offload_states:ZeroStageEnum",
    },
    "deepspeed.runtime.zero.offload_config": {
        "OffloadDeviceEnum": f"{_HERE}.offload_states:OffloadDeviceEnum",
        "OffloadStateTypeEnum": f"{_HERE}.offload_states:OffloadStateTypeEnum",
    },
    "deepspeed.runtime.zero.partition_parameters": {
        **_ZERO,
        "_orig_torch_arange": "torch:arange",
        "get_accelerator": _ACCELERATOR,
        "ZeroParamStatus": _STATUS,
        "zero_wrapper_for_fp_tensor_constructor": f"{_HERE}.gathering:zero_wrapper_for_fp_tensor_constructor",
    },
    "deepspeed.sequence": {},
    "deepspeed.sequence.layer": {"DistributedAttention": f"{_SEQUENCE}:DistributedAttention"},
    "deepspeed.utils": {
        **_LEAVES,
        **_SAFE,
        "log_dist": _LOG_DIST,
        "logger": _LOGGER,
        "RepeatingLoader": f"{_HERE}.tensors:RepeatingLoader",
    },
    "deepspeed.utils.groups": {
        name: f"{_HERE}.groups:{name}"
        for name in (
            "_get_data_parallel_group",
            "_get_data_parallel_rank",
            "_get_data_parallel_world_size",
            "_get_sequence_parallel_group",
            "_get_sequence_parallel_rank",
            "_get_sequence_parallel_world_size",
            "get_data_parallel_group",
            "get_data_parallel_rank",
            "get_data_parallel_world_size",
        )
    },
    "deepspeed.utils.logging": {
        "log_dist": _LOG_DIST,
        "logger": _LOGGER,
        "print_rank_0": f"{_HERE}.logging:print_rank_0",
    },
    "deepspeed.utils.zero_to_fp32": {
        name: f"{_HERE}.zero_to_fp32:{name}"
        for name in (
            "convert_zero_checkpoint_to_fp32_state_dict",
            "get_fp32_state_dict_from_zero_checkpoint",
            "get_model_state_file",
            "get_optim_files",
            "load_state_dict_from_zero_checkpoint",
        )
    },
    "deepspeed.zero": {
        **_ZERO,
        "MiCS_Init": Unbuilt("DeepSpeed has removed MiCS: set zeroxide.mesh.dp_shard, and use zero.Init"),
        "TiledLinear": _later("tiled linear layers (large matrices are cut by rows as they are)"),
        "unregister_external_parameter": "zeroxide.zero:unregister_external_parameter",
        "ZeroParamStatus": _STATUS,
    },
}
"""By module, its names: "package.module:name" or "package.module", or what is not built."""
