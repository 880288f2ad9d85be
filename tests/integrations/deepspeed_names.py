"""Names of DeepSpeed that other libraries and scripts use, module by module."""

from __future__ import annotations

__all__ = ["USED"]

USED = {
    "deepspeed": "initialize init_distributed DeepSpeedEngine __version__ tp_model_init get_accelerator "
    "add_config_arguments init_inference PipelineModule OnDevice comm zero checkpointing ops runtime utils version",
    "deepspeed.accelerator": "get_accelerator",
    "deepspeed.checkpoint.utils": "clone_tensors_for_torch_save",
    "deepspeed.checkpointing": "configure checkpoint is_configured reset",
    "deepspeed.comm": "init_distributed is_initialized get_rank get_world_size get_local_rank barrier all_reduce "
    "broadcast all_gather_object ReduceOp",
    "deepspeed.elasticity": "compute_elastic_config",
    "deepspeed.git_version_info": "version",
    "deepspeed.launcher.runner": "DEEPSPEED_ENVIRONMENT_NAME",
    "deepspeed.module_inject.layers": "GatherReplacedLayerParams",
    "deepspeed.moe.layer": "MoE",
    "deepspeed.moe.utils": "split_params_into_different_moe_groups_for_optimizer",
    "deepspeed.monitor.monitor": "MonitorMaster",
    "deepspeed.ops.adagrad": "DeepSpeedCPUAdagrad",
    "deepspeed.ops.adam": "DeepSpeedCPUAdam FusedAdam",
    "deepspeed.env_report": "op_report",
    "deepspeed.ops": "__compatible_ops__ adam op_builder",
    "deepspeed.ops.aio": "AsyncIOBuilder",
    "deepspeed.ops.lion": "DeepSpeedCPULion FusedLion",
    "deepspeed.ops.op_builder": "AsyncIOBuilder CPUAdamBuilder FusedAdamBuilder GDSBuilder UtilsBuilder OpBuilder",
    "deepspeed.ops.op_builder.all_ops": "ALL_OPS",
    "deepspeed.pipe": "PipelineModule LayerSpec TiedLayerSpec",
    "deepspeed.profiling.flops_profiler": "get_model_profile FlopsProfiler",
    "deepspeed.runtime.base_optimizer": "DeepSpeedOptimizer",
    "deepspeed.runtime.config": "DeepSpeedConfig",
    "deepspeed.runtime.engine": "DeepSpeedEngine",
    "deepspeed.runtime.lr_schedules": "VALID_LR_SCHEDULES LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR",
    "deepspeed.runtime.sequence_parallel.ulysses_sp": "UlyssesSPAttentionHF UlyssesSPDataLoaderAdapter TiledMLP "
    "TiledFusedLogitsLoss SequenceTiledCompute sequence_tiled_compute",
    "deepspeed.runtime.sequence_parallel.parallel_state_sp": "initialize_sequence_parallel get_sequence_parallel_group "
    "get_sequence_parallel_world_size get_sequence_parallel_rank get_sequence_data_parallel_group "
    "get_sequence_data_parallel_world_size get_sequence_data_parallel_rank",
    "deepspeed.runtime.chunked_cross_entropy": "chunked_cross_entropy",
    "deepspeed.sequence.layer": "DistributedAttention",
    "deepspeed.runtime.utils": "move_to_device see_memory_usage",
    "deepspeed.runtime.zero.offload_config": "OffloadStateTypeEnum OffloadDeviceEnum",
    "deepspeed.runtime.zero.partition_parameters": "ZeroParamStatus zero_wrapper_for_fp_tensor_constructor "
    "_orig_torch_arange get_accelerator GatheredParameters Init",
    "deepspeed.runtime.zero.stage3": "estimate_zero3_model_states_mem_needs_all_live "
    "estimate_zero3_model_states_mem_needs_all_cold",
    "deepspeed.runtime.zero.stage_1_and_2": "estimate_zero2_model_states_mem_needs_all_live "
    "estimate_zero2_model_states_mem_needs_all_cold",
    "deepspeed.utils": "logger log_dist groups RepeatingLoader set_z3_leaf_modules get_z3_leaf_modules "
    "unset_z3_leaf_modules z3_leaf_module safe_get_full_grad safe_set_full_grad safe_get_full_fp32_param "
    "safe_set_full_fp32_param safe_get_full_optimizer_state safe_set_full_optimizer_state safe_get_local_grad "
    "safe_get_local_fp32_param safe_get_local_optimizer_state",
    "deepspeed.utils.groups": "_get_sequence_parallel_group _get_sequence_parallel_world_size "
    "_get_sequence_parallel_rank _get_data_parallel_group",
    "deepspeed.utils.logging": "logger",
    "deepspeed.utils.zero_to_fp32": "get_fp32_state_dict_from_zero_checkpoint get_model_state_file get_optim_files "
    "convert_zero_checkpoint_to_fp32_state_dict load_state_dict_from_zero_checkpoint",
    "deepspeed.zero": "Init GatheredParameters register_external_parameter ZeroParamStatus",
}
"""What the newest releases of transformers, accelerate, PEFT, TRL, Lightning, axolotl, LLaMA-Factory, ms-swift and
OpenRLHF import, and what scripts for DeepSpeed do; written down from their sources, not from ours."""
