"""Methods of DeepSpeed's engine that scripts call, beside those that an engine has anyway; and the others' names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from zeroxide.config.sections.zero import Offload
from zeroxide.engine.parts import Parts
from zeroxide.errors import ConfigError, ModelError
from zeroxide.precision.policy import torch_dtype

__all__ = ["ABSENT", "DeepSpeedMethods", "OffloadHome"]

_ROUTES = ("train", "eval", "predict")


@dataclass(frozen=True)
class OffloadHome:
    """Where something is at home that is not where the model computes."""

    device: str
    """"cpu" or "nvme"."""
    nvme_path: Path | None
    """The folder on disk, None in host memory."""


class DeepSpeedMethods:
    """The methods."""

    parts: Parts
    """What they all ask."""
    module: Any
    """The model."""

    def get_sequence_parallel_group(self) -> Any:
        """The process group of the ranks that share sequences with this one. Raises ModelError where none do."""
        if self.parts.sequences is None:
            raise ModelError("no ranks share sequences: set sequence_parallel_size in the config")
        return self.parts.sequences.state.get_sequence_parallel_group()

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader[Any]:
        """A loader of this rank's share of `dataset`, like that of `training_data`. Every rank calls it.

        batch_size: samples of a batch; those of one forward if None.
        route: "train" for another order at every pass, "eval" or "predict" for the data's own order.
        pin_memory: whether batches are made in locked memory, where the model computes on a device.
        data_sampler: whose indices are taken instead, as they are.
        collate_fn: makes a batch; that of `initialize` if None.
        num_local_io_workers: processes that load; None for this one.

        Raises ConfigError for another route and without a batch size, DataError where there is no whole batch.
        """
        if route not in _ROUTES:
            raise ConfigError(f"deepspeed_io: expected a route of {', '.join(_ROUTES)}, got {route!r}", path="route")
        return self.parts.loaders.make(
            dataset,
            batch_size,
            in_order=route != "train",
            sampler=data_sampler,
            collate_fn=collate_fn,
            pin_memory=pin_memory and self.parts.transfers is not None,
            num_workers=num_local_io_workers or 0,
        )

    def compile(
        self,
        backend: str | Callable[..., Any] = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compiles the model in place by `torch.compile`, once; gathers break its graphs, at the edges of units.

        compile_kwargs: further arguments of `torch.compile`. Raises ConfigError for a schedule of compiler passes and
        for compiled autograd, which are DeepCompile's.
        """
        if schedule is not None or compiled_autograd_enabled:
            name = "schedule" if schedule is not None else "compiled_autograd_enabled"
            raise ConfigError(f"engine.compile: {name} is DeepCompile's, which is not built in zeroxide", path=name)
        if not self.is_compiled:
            self.module.compile(**{**(compile_kwargs or {}), "backend": backend})

    @property
    def is_compiled(self) -> bool:
        """Whether the model is."""
        found: bool = self.module._compiled_call_impl is not None
        return found

    def allreduce_gradients(self, bucket_size: int = 500_000_000) -> None:
        """Returns at once: gradients are summed over ranks within backward, unit by unit, whatever `bucket_size` is.

        Those that `no_sync` has put off wait for a backward outside of it; `step` refuses to go on without.
        """
        self.parts.core()

    def save_fp16_model(self, save_dir: str | Path, save_filename: str | None = None) -> Path:
        """`save_16bit_model` under its older name."""
        found: Path = self.save_16bit_model(save_dir, save_filename)  # type: ignore[attr-defined]
        return found

    def get_data_parallel_rank(self) -> int:
        """This rank's place among those that take different samples."""
        return self.parts.loaders.group.position

    def get_tensor_parallel_rank(self) -> int:
        """This rank's place among those that share every matrix."""
        return self.parts.job.tensor.rank

    def get_model_parallel_rank(self) -> int:
        """The same under its older name."""
        return self.parts.job.tensor.rank

    def autotp_size(self) -> int:
        """How many ranks share every matrix; 0 where none do."""
        return self.parts.job.tensor.world if self.parts.tensor.group is not None else 0

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """(dtype of weights in forward, dtype in which gradients are accumulated)."""
        precision = self.parts.config.precision
        return torch_dtype(precision.dtype), torch_dtype(precision.grad_dtype)

    def optimizer_name(self) -> str | None:
        """`optimizer.type` of the config in lower case, None without that section."""
        found: str | None = (self.parts.given.get("optimizer") or {}).get("type")
        return None if found is None else found.lower()

    def optimizer_params(self) -> dict[str, Any] | None:
        """`optimizer.params` as the config words it, None without that section."""
        return _section(self.parts.given, "optimizer")

    def scheduler_name(self) -> str | None:
        """`scheduler.type` of the config, None without that section."""
        scheduler = self.parts.config.scheduler
        return None if scheduler is None else scheduler.name

    def scheduler_params(self) -> dict[str, Any] | None:
        """`scheduler.params` as the config words it, None without that section."""
        return _section(self.parts.given, "scheduler")

    def managed_gradient_accumulation(self) -> bool:
        """Whether the engine counts micro-batches."""
        return self.parts.config.batch.managed_gradient_accumulation

    def dataloader_drop_last(self) -> bool:
        """Whether a last batch that is not whole is left out."""
        return self.parts.config.batch.dataloader_drop_last

    def zero_cpu_offload(self) -> bool:
        """Whether optimizer state is at home in host memory."""
        return self.parts.config.zero.offload_optimizer.kind == "cpu"

    def zero_use_cpu_optimizer(self) -> bool:
        """Whether optimizer state is at home in host memory or on disk."""
        return self.parts.config.zero.offload_optimizer.kind != "none"

    def zero_offload_optimizer(self) -> OffloadHome | None:
        """Where optimizer state is at home; None where it stays where the model computes."""
        return _home(self.parts.config.zero.offload_optimizer)

    def zero_offload_param(self) -> OffloadHome | None:
        """Where weights are at home; None where they stay where the model computes."""
        return _home(self.parts.config.zero.offload_param)


def _section(given: dict[str, Any], name: str) -> dict[str, Any] | None:
    section = given.get(name)
    return None if section is None else dict(section.get("params") or {})


def _home(offload: Offload) -> OffloadHome | None:
    return None if offload.kind == "none" else OffloadHome(offload.kind, offload.path)


def _names(line: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), line)


ABSENT: dict[str, str] = {
    **_names(
        "engine.config has what the config says, engine.resolved_config what counts",
        """aio_config autotuning_enabled bf16_master_weights_and_gradients bf16_optimizer_states
        checkpoint_serialization_enabled checkpoint_tag_validation_enabled checkpoint_tag_validation_fail
        checkpoint_writer_enabled clip_fp32_gradients communication_data_type compile_zero_optimization_stage
        cpuadam_cores_perc curriculum_learning_config curriculum_learning_enabled data_efficiency_config
        data_efficiency_enabled data_sampling_config data_sampling_enabled dump_state dynamic_loss_scale_args
        flops_profiler_detailed flops_profiler_enabled flops_profiler_module_depth flops_profiler_output_file
        flops_profiler_profile_step flops_profiler_recompute_fwd_factor flops_profiler_top_modules fp16_auto_cast
        fp16_master_weights_and_gradients get_optimizer_configuration get_type gradient_predivide_factor
        initial_dynamic_scale is_sanity_checks_enabled log_level memory_breakdown optimizer_legacy_fusion
        postscale_gradients print_forward_breakdown random_ltd_config random_ltd_enabled super_offload
        swap_tensor_config tensor_parallel_config torch_autocast_dtype torch_autocast_enabled
        torch_autocast_lower_precision_safe_modules use_node_local_storage zenflow_config zero_allgather_bucket_size
        zero_allgather_partitions zero_allgather_sequential zero_allow_untested_optimizer zero_compute_grad_norm
        zero_contiguous_gradients zero_elastic_checkpoint zero_force_ds_cpu_optimizer zero_hpz_partition_size
        zero_ignore_unused_parameters zero_legacy_stage1 zero_load_from_fp32_weights zero_log_trace_cache_warnings
        zero_max_live_parameters zero_max_reuse_distance zero_model_persistence_threshold
        zero_module_granularity_threshold zero_multi_rank_bucket_allreduce zero_nvme_offload_optimizer
        zero_overlap_comm zero_param_persistence_threshold zero_parameter_alignment zero_partial_offload
        zero_prefetch_bucket_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
        zero_reduce_bucket_size zero_reduce_scatter zero_round_robin_gradients
        zero_save_muon_momentum_buffer_in_memory zero_sub_group_size""",
    ),
    **_names(
        "gradients are summed over ranks within backward, unit by unit; engine.no_sync() puts that off",
        """all_gather_scalar allreduce_and_copy allreduce_bucket allreduce_no_retain buffered_allreduce_fallback
        coalesce_grad_reduction sparse_all_gather sparse_allreduce sparse_allreduce_bucket
        sparse_allreduce_no_retain""",
    ),
    **_names(
        "DeepCompile is not built in zeroxide; engine.compile() is torch.compile",
        """compile_autosp compile_autotp get_autosp_backend get_autotp_backend get_compile_time get_deepcompile_backend
        get_deepspeed_compile_backend is_deepcompile_active is_deepcompile_enabled register_compile_pass
        uses_parallelization_pass_only""",
    ),
    **_names(
        "autotuning is not built in zeroxide",
        """autotuning_end_profile_step autotuning_metric autotuning_metric_path autotuning_model_info_path
        autotuning_profile_model_info autotuning_start_profile_step""",
    ),
    **_names(
        "curriculum learning and random-LTD are not built in zeroxide",
        "random_ltd_initialize set_custom_curriculum_learning_schedule set_data_post_process_func",
    ),
    **_names(
        "this of expert parallelism is not built in zeroxide yet",
        "load_moe_state_dict",
    ),
    **_names("it is DeepSpeed's own machinery", "is_first_weights_partition_group"),
    **_names("isinstance(dataset, ...) tells", "is_iterable_style_dataset is_map_style_dataset"),
    "collect_python_gc": "Python's garbage collector is left as it is",
    "load_universal_checkpoint": "load_checkpoint reads at any world size what save_checkpoint wrote, and "
    "`zeroxide convert` universal checkpoints",
}
"""Methods of DeepSpeed's engine that are not there -> what to do instead."""
