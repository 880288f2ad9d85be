"""The config: what is accepted, and what it comes to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from given_configs import ADAM, BF16, COSINE, DECAY, FP16, GIB, ONE_CYCLE, RANGE_TEST, WARMUP, complaint, merged, nested

from zeroxide.config import (
    ErrorFeedback,
    LogFolder,
    LossScale,
    Mesh,
    Offload,
    Optimizer,
    Scheduler,
    TPLayerSpec,
    WandbRun,
    load,
)
from zeroxide.config.check import all_keys, section_of
from zeroxide.config.document import Document
from zeroxide.config.fields import NoEffect, NotBuilt
from zeroxide.config.sections.optimizer import keys_of
from zeroxide.config.sections.scheduler import SCHEDULES
from zeroxide.errors import ConfigError

# --- every key with an effect changes the resolved config ------------------------------------------------------------

STAGE3 = {"zero_optimization": {"stage": 3}}
ACTIVATIONS = {"zeroxide": {"activations": "disk", "activation_path": "/slow"}}
INT4 = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}

# key, value, what it needs beside it, field of Config, value of that field
MONITORS = {
    "tensorboard": ("output_path", "job_name"),
    "wandb": ("group", "team", "project"),
    "csv_monitor": ("output_path", "job_name"),
}
CUT = {**STAGE3, "tensor_parallel": {"autotp_size": 2}}

EFFECTS = [
    ("train_batch_size", 8, {}, "batch.train_batch_size", 8),
    ("zero_optimization.leaf_module.classes", ["Moe"], {}, "zero.leaf_classes", ("Moe",)),
    ("zero_optimization.leaf_module.names", ["model.moe"], {}, "zero.leaf_names", ("model.moe",)),
    ("zero_optimization.leaf_module.name_suffixes", [".moe"], {}, "zero.leaf_suffixes", (".moe",)),
    ("train_micro_batch_size_per_gpu", 4, {}, "batch.train_micro_batch_size_per_gpu", 4),
    ("gradient_accumulation_steps", 3, {}, "batch.gradient_accumulation_steps", 3),
    ("gradient_clipping", 0.5, {}, "gradients.clipping", 0.5),
    ("steps_per_print", 7, {}, "report.steps_per_print", 7),
    ("wall_clock_breakdown", True, {}, "report.wall_clock_breakdown", True),
    ("tensorboard.enabled", True, {}, "monitor.tensorboard", LogFolder("", "DeepSpeedJobName")),
    *(
        (f"{name}.{key}", "x", {name: {"enabled": True}}, f"monitor.{name}.{key}", "x")
        for name, keys in MONITORS.items()
        for key in keys
    ),
    ("wandb.enabled", True, {}, "monitor.wandb", WandbRun("deepspeed")),
    ("csv_monitor.enabled", True, {}, "monitor.csv_monitor", LogFolder("", "DeepSpeedJobName")),
    ("flops_profiler.enabled", True, {}, "flops_profiler.enabled", True),
    *(
        (f"flops_profiler.{key}", value, {"flops_profiler": {"enabled": True}}, f"flops_profiler.{key}", value)
        for key, value in {
            "recompute_fwd_factor": 1.0,
            "profile_step": 3,
            "module_depth": 2,
            "top_modules": 5,
            "detailed": False,
        }.items()
    ),
    ("flops_profiler.output_file", "a", {"flops_profiler": {"enabled": True}}, "flops_profiler.output_file", Path("a")),
    ("comms_logger.enabled", True, {}, "comms_logger.enabled", True),
    *(
        (f"comms_logger.{key}", value, {"comms_logger": {"enabled": True}}, f"comms_logger.{key}", value)
        for key, value in {"verbose": True, "prof_all": False, "debug": True}.items()
    ),
    (
        "comms_logger.prof_ops",
        ["broadcast"],
        {"comms_logger": {"enabled": True, "prof_all": False}},
        "comms_logger.prof_ops",
        ("broadcast",),
    ),
    ("zeroxide.mesh.pp", 2, STAGE3, "mesh", Mesh(pp=2, dp_shard=2)),
    ("pipeline.stages", 2, {}, "mesh", Mesh(pp=2, dp_replicate=2)),
    *(
        (f"pipeline.{key}", value, {"pipeline": {"stages": 2}}, f"pipeline.{key}", value)
        for key, value in {
            "partition": "type:block",
            "schedule": "gpipe",
            "stages_per_rank": 2,
            "activation_checkpoint_interval": 3,
        }.items()
    ),
    ("zeroxide.log", "a/b.jsonl", {}, "zeroxide.log", Path("a/b.jsonl")),
    ("dataloader_drop_last", True, {}, "batch.dataloader_drop_last", True),
    ("managed_gradient_accumulation", False, {}, "batch.managed_gradient_accumulation", False),
    ("bf16.enabled", True, {}, "precision.dtype", "bf16"),
    ("bf16.check_grad_overflow", False, BF16, "precision.check_overflow", False),
    ("bfloat16.enabled", True, {}, "precision.dtype", "bf16"),
    ("bfloat16.check_grad_overflow", False, {"bfloat16": {"enabled": True}}, "precision.check_overflow", False),
    ("fp16.enabled", True, {}, "precision.dtype", "fp16"),
    ("fp16.auto_cast", True, FP16, "precision.cast_inputs", True),
    ("fp16.loss_scale", 128, FP16, "precision.loss_scale", LossScale(initial=128.0, dynamic=False)),
    ("fp16.initial_scale_power", 8, FP16, "precision.loss_scale", LossScale(initial=256.0)),
    ("fp16.loss_scale_window", 7, FP16, "precision.loss_scale", LossScale(window=7)),
    ("fp16.hysteresis", 5, FP16, "precision.loss_scale", LossScale(hysteresis=5)),
    ("fp16.consecutive_hysteresis", True, FP16, "precision.loss_scale", LossScale(consecutive_hysteresis=True)),
    ("fp16.min_loss_scale", 0.5, FP16, "precision.loss_scale", LossScale(minimum=0.5)),
    ("torch_autocast.enabled", True, {}, "precision.autocast", "bf16"),
    ("torch_autocast.dtype", "float16", {"torch_autocast": {"enabled": True}}, "precision.autocast", "fp16"),
    ("data_types.grad_accum_dtype", "fp32", {"bf16": {"enabled": True}}, "precision.grad_dtype", "fp32"),
    ("data_types.buffer_dtype", "fp32", {"bf16": {"enabled": True}}, "precision.buffer_dtype", "fp32"),
    ("data_types.param_dtype", "fp32", {}, "precision.dtype", "fp32"),
    ("data_types.keep_in_fp32_modules", ["gate*"], {}, "precision.keep_in_fp32", ("gate*",)),
    ("communication_data_type", "fp32", BF16, "precision.reduce_dtype", "fp32"),
    ("gradient_allreduce_op", "sum", {}, "gradients.reduce_sum", True),
    ("activation_checkpointing.cpu_checkpointing", True, {}, "activation_checkpointing.cpu_checkpointing", True),
    ("zeroxide.gradients", "disk", {}, "zeroxide.gradients", "disk"),
    (
        "zeroxide.activations",
        "disk",
        {"zeroxide": {"activation_path": "/a", "host_memory": 1 << 30}},
        "activations.home",
        "disk",
    ),
    ("zeroxide.recompute", "all", ACTIVATIONS, "activations.recompute", "all"),
    ("zeroxide.recompute", 3, {}, "activations.recompute", 3),
    ("zeroxide.activation_path", "/fast", ACTIVATIONS, "activations.path", Path("/fast")),
    ("zeroxide.activation_disk", "1GiB", ACTIVATIONS, "activations.disk", 1 << 30),
    ("zeroxide.activation_buffers", "8MiB", ACTIVATIONS, "activations.buffers", 8 << 20),
    ("zeroxide.transport", "collective", {}, "zeroxide.transport", "collective"),
    ("optimizer.type", "AdamW", {"optimizer": {}}, "optimizer", Optimizer()),
    ("optimizer.params.lr", 0.25, ADAM, "optimizer", Optimizer(lr=0.25)),
    ("optimizer.params.betas", [0.5, 0.75], ADAM, "optimizer", Optimizer(betas=(0.5, 0.75))),
    ("optimizer.params.eps", 1e-6, ADAM, "optimizer", Optimizer(eps=1e-6)),
    ("optimizer.params.weight_decay", 0.1, ADAM, "optimizer", Optimizer(weight_decay=0.1)),
    ("optimizer.params.adam_w_mode", False, ADAM, "optimizer", Optimizer(decoupled=False)),
    ("optimizer.params.torch_adam", True, ADAM, "optimizer", Optimizer(weight_decay=0.01)),
    ("optimizer.params.bias_correction", False, ADAM, "optimizer", Optimizer(bias_correction=False)),
    ("scheduler.type", "WarmupLR", {"scheduler": {}}, "scheduler", Scheduler("WarmupLR", {})),
    *(
        (f"scheduler.params.{name}", value, {"scheduler": each}, "scheduler.params", {**each["params"], name: value})
        for each, name, value in [
            (WARMUP, "warmup_num_steps", 5),
            (WARMUP, "warmup_type", "linear"),
            (WARMUP, "warmup_min_lr", 0.01),
            (WARMUP, "warmup_max_lr", 0.5),
            (WARMUP, "last_batch_iteration", 5),
            (DECAY, "total_num_steps", 9),
            (DECAY, "warmup_min_lr", 0.0005),
            (COSINE, "total_num_steps", 9),
            (COSINE, "warmup_min_ratio", 0.25),
            (COSINE, "cos_min_ratio", 0.5),
            (RANGE_TEST, "lr_range_test_min_lr", 0.5),
            (RANGE_TEST, "lr_range_test_step_size", 5),
            (RANGE_TEST, "lr_range_test_step_rate", 0.5),
            (RANGE_TEST, "lr_range_test_staircase", True),
            (ONE_CYCLE, "cycle_min_lr", 0.02),
            (ONE_CYCLE, "cycle_max_lr", 0.5),
            (ONE_CYCLE, "decay_lr_rate", 0.5),
            (ONE_CYCLE, "cycle_first_step_size", 5),
            (ONE_CYCLE, "cycle_second_step_size", 7),
            (ONE_CYCLE, "cycle_first_stair_count", 3),
            (ONE_CYCLE, "cycle_second_stair_count", 4),
            (ONE_CYCLE, "decay_step_size", 6),
            (ONE_CYCLE, "cycle_momentum", False),
            (ONE_CYCLE, "cycle_min_mom", 0.5),
            (ONE_CYCLE, "cycle_max_mom", 0.95),
            (ONE_CYCLE, "decay_mom_rate", 0.25),
        ]
    ),
    ("zero_optimization.stage", 2, {}, "zero.stage", 2),
    (
        "zero_optimization.compute_grad_norm",
        False,
        {"zero_optimization": {"stage": 1}, "gradient_clipping": 0},
        "zero.compute_grad_norm",
        False,
    ),
    ("zero_optimization.offload_param.device", "cpu", STAGE3, "zero.offload_param", Offload("cpu")),
    (
        "zero_optimization.offload_param.nvme_path",
        "/d",
        merged(STAGE3, nested("zero_optimization.offload_param.device", "nvme")),
        "zero.offload_param",
        Offload("nvme", Path("/d")),
    ),
    ("zero_optimization.offload_optimizer.device", "cpu", STAGE3, "zero.offload_optimizer", Offload("cpu")),
    (
        "zero_optimization.offload_optimizer.nvme_path",
        "/d",
        merged(STAGE3, nested("zero_optimization.offload_optimizer.device", "nvme")),
        "zero.offload_optimizer",
        Offload("nvme", Path("/d")),
    ),
    (
        "zero_optimization.offload_optimizer.ratio",
        0.5,
        merged(STAGE3, nested("zero_optimization.offload_optimizer.device", "cpu")),
        "zero.cpu_share",
        0.5,
    ),
    ("zero_optimization.cpu_offload", True, STAGE3, "zero.offload_optimizer", Offload("cpu")),
    ("zero_optimization.cpu_offload_param", True, STAGE3, "zero.offload_param", Offload("cpu")),
    ("aio.queue_depth", 5, {}, "aio.queue_depth", 5),
    ("aio.use_gds", True, {}, "aio.use_gds", True),
    ("zeroxide.device", "cuda:1", {}, "zeroxide.device", "cuda:1"),
    ("zeroxide.host_memory", "2GiB", {}, "zeroxide.host_memory", 2 * GIB),
    ("zeroxide.device_memory", "2GiB", {}, "zeroxide.device_memory", 2 * GIB),
    ("zeroxide.format", "fp32", {"bf16": {"enabled": True}}, "precision.format", "fp32"),
    ("zeroxide.rounding_seed", 7, {}, "precision.rounding_seed", 7),
    ("zeroxide.io_engine", "threads", {}, "zeroxide.io_engine", "threads"),
    ("zeroxide.threads", 3, {}, "zeroxide.threads", 3),
    ("zeroxide.unit_bytes", "64MiB", {}, "zeroxide.unit_bytes", 64 << 20),
    ("zeroxide.row_bytes", "64MiB", {}, "zeroxide.row_bytes", 64 << 20),
    ("zeroxide.tile_bytes", "256KiB", {}, "zeroxide.tile_bytes", 256 << 10),
    ("zeroxide.staging_bytes", "32MiB", {}, "zeroxide.staging_bytes", 32 << 20),
    ("zeroxide.prefetch", 0, {}, "zeroxide.prefetch", 0),
    ("zeroxide.disks", ["/a", "b/c"], {}, "zeroxide.disks", (Path("/a"), Path("b/c"))),
    ("zeroxide.state_in_memory", "1GiB", {}, "zeroxide.state_in_memory", 1 << 30),
    ("zeroxide.accumulation_order", "layers", {}, "zeroxide.accumulation_order", "layers"),
    ("zeroxide.unrouted_experts", "lazy", {}, "zeroxide.unrouted_experts", "lazy"),
    ("zeroxide.micro_batch_seeds", True, {}, "zeroxide.micro_batch_seeds", True),
    ("zeroxide.update_in_backward", True, {}, "zeroxide.update_in_backward", True),
    ("zeroxide.update_in_backward", "adaptive", {}, "zeroxide.update_in_backward", "adaptive"),
    ("zeroxide.trim_libraries", False, {}, "zeroxide.trim_libraries", False),
    ("zeroxide.checkpoint_background", True, {}, "checkpoint.background", True),
    ("zeroxide.checkpoint_memory", "1GiB", {}, "checkpoint.memory", GIB),
    ("checkpoint.writer.decoupled", True, {}, "checkpoint.background", True),
    ("zeroxide.rank_timeout", 2.5, {}, "zeroxide.rank_timeout", 2.5),
    ("zeroxide.durable_every", 50, {}, "zeroxide.durable_every", 50),
    ("zeroxide.durable_name", "a-b.1", {"zeroxide": {"durable_every": 1}}, "zeroxide.durable_name", "a-b.1"),
    ("tensor_parallel.autotp_size", 2, STAGE3, "mesh", Mesh(dp_shard=2, tp=2)),
    ("tensor_parallel.tp.tp_size", 2, STAGE3, "mesh", Mesh(dp_shard=2, tp=2)),
    ("tensor_parallel.vocab_parallel_lm_head", True, CUT, "tensor_parallel.vocab_parallel_lm_head", True),
    ("tensor_parallel.preset_model", "gpt2", CUT, "tensor_parallel.preset_model", "gpt2"),
    ("tensor_parallel.partition_config.use_default_specs", False, CUT, "tensor_parallel.use_default_specs", False),
    (
        "tensor_parallel.partition_config.layer_specs",
        [
            {"patterns": [".*up"], "shape": [[4, 2], -1], "partition_dim": 0},
            {"patterns": ["b"], "partition_type": "row"},
        ],
        CUT,
        "tensor_parallel.layer_specs",
        (TPLayerSpec((".*up",), shape=((4, 2), -1), partition_dim=0), TPLayerSpec(("b",), "row")),
    ),
    ("zeroxide.mesh.tp", 2, STAGE3, "mesh", Mesh(dp_shard=2, tp=2)),
    ("zeroxide.mesh.dp_shard", 2, STAGE3, "mesh", Mesh(dp_replicate=2, dp_shard=2)),
    ("zeroxide.mesh.ep", 2, STAGE3, "mesh", Mesh(dp_shard=4, ep=2)),
    ("expert_parallel.enabled", True, {}, "expert_parallel.enabled", True),
    *(
        (f"expert_parallel.{key}", value, {"expert_parallel": {"enabled": True}}, f"expert_parallel.{key}", value)
        for key, value in {
            "autoep_size": 2,
            "preset_model": "mixtral",
            "moe_layer_pattern": "mlp",
            "expert_pattern": "experts",
        }.items()
    ),
    ("zeroxide.mesh.dp_replicate", 2, STAGE3, "mesh", Mesh(dp_replicate=2, dp_shard=2)),
    ("zeroxide.mesh.sp", 2, STAGE3, "mesh", Mesh(dp_shard=2, sp=2)),
    ("sequence_parallel_size", 2, STAGE3, "mesh", Mesh(dp_shard=2, sp=2)),
    ("data_parallel_size", 2, STAGE3, "mesh", Mesh(dp_shard=2, sp=2)),
    ("zero_optimization.zero_hpz_partition_size", 2, STAGE3, "mesh", Mesh(dp_replicate=2, dp_shard=2)),
    ("zero_optimization.zero_quantized_weights", True, STAGE3, "zero.quantized_weights", True),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, STAGE3, "zero.quantized_frozen", True),
    ("zero_optimization.zero_quantized_gradients", True, STAGE3, "zero.quantized_gradients", True),
    ("zero_optimization.zeropp_loco_param.err_beta", 0.5, INT4, "zero.feedback", ErrorFeedback(beta=0.5)),
    ("zero_optimization.zeropp_loco_param.reset_T", 9, INT4, "zero.feedback", ErrorFeedback(reset_steps=9)),
]


@pytest.mark.parametrize(("key", "value", "beside", "name", "expected"), EFFECTS, ids=[each[0] for each in EFFECTS])
def test_a_key_with_an_effect_changes_the_config(key, value, beside, name, expected):
    # Of the model's own dtype, which a config may overrule.
    own = {"own_dtype": lambda: "bf16"} if key == "data_types.param_dtype" else {}
    if name.split(".")[0] in ("mesh", "pipeline", "tensor_parallel"):
        own["world_size"] = 4
    after = load(merged(beside, nested(key, value)), **own)
    for step in name.split("."):
        after = getattr(after, step)
    assert after == expected
    if key.endswith((".type", "nvme_path")):
        return  # without these keys the rest of the section is not complete
    before = load(beside, **own)
    for step in name.split("."):
        before = getattr(before, step)
    assert before != expected


def keys_with_an_effect() -> set[str]:
    found = set()
    for model, prefix in [
        (Document, ()),
        (keys_of(Optimizer), ("optimizer", "params")),
        *((each, ("scheduler", "params")) for each in SCHEDULES.values()),
    ]:
        for path in all_keys(model):
            info = None
            owner = model
            for step in path:
                info = owner.model_fields[step]
                owner = section_of(info.annotation) or owner
            marked = any(isinstance(mark, NoEffect | NotBuilt) for mark in info.metadata)
            if not marked and section_of(info.annotation) is None and path[-1] != "params":
                found.add(".".join((*prefix, *path)))
    return found


def test_every_key_with_an_effect_is_in_the_table_above():
    assert keys_with_an_effect() == {each[0] for each in EFFECTS}


# --- keys without an effect, and keys not built ----------------------------------------------------------------------


def test_a_name_for_commits_that_nobody_makes_is_refused():
    with pytest.raises(ConfigError, match="durable_every = 0 makes none") as refused:
        load({"zeroxide": {"durable_name": "first"}})
    assert refused.value.path == "zeroxide.durable_name"


def test_keys_without_an_effect_are_listed_once_with_a_reason():
    config = load(
        {
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "reduce_bucket_size": 5e8,
                "contiguous_gradients": "auto",
                "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_size": 1e8},
            },
            "aio": {"thread_count": 4, "block_size": 1048576},
            "fp16": {"enabled": False, "loss_scale": 0},
            "flops_profiler": {"enabled": False, "detailed": True},
            "optimizer": {"type": "Adam", "params": {"fused": True}},
        }
    )
    names = [name for name, _ in config.no_effect]
    assert sorted(names) == sorted(set(names))
    assert set(names) == {
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_optimizer.buffer_size",
        "aio.thread_count",
        "aio.block_size",
        "fp16.loss_scale",
        "flops_profiler.detailed",
        "optimizer.params.fused",
    }
    assert all(reason and "\n" not in reason for _, reason in config.no_effect)
    assert config == dataclasses.replace(
        load({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, lr=1e-3),
        no_effect=config.no_effect,
        source=config.source,
    )


NOT_BUILT = [
    ("fp16.fp16_master_weights_and_grads", True, "fp16 master weights"),
    ("pipeline.seed_layers", True, "seeds from the config"),
    ("expert_parallel.top_k", 1, "routers other than the model's own"),
    ("expert_parallel.comm_backend", "deepep", "DeepEP"),
    ("use_data_before_expert_parallelism", True, "expert parallelism"),
    ("tensor_parallel.vocab_parallel_ce_backend", "liger", "Liger"),
    ("zero_optimization.zenflow.topk_ratio", 0.1, "ZenFlow"),
    ("zero_optimization.offload_optimizer.super_offload", True, "super offload"),
    ("torch_autocast.lower_precision_safe_modules", ["torch.nn.Linear"], "dtype of autocast"),
    ("comet.enabled", True, "zeroxide.log"),
    ("monitor_config.wandb.enabled", True, "at the top of the config"),
    ("autotuning.enabled", True, "autotuning"),
    ("compile.deepcompile", True, "compiled graphs"),
    ("hybrid_engine.enabled", True, "hybrid engine"),
    ("activation_checkpointing.contiguous_memory_optimization", True, "contiguous activation"),
    ("checkpoint.load_universal", True, "universal"),
    ("bf16.bf16_optimizer_states", True, "bf16 optimizer states"),
]


REMOVED = [
    ("amp.enabled", True, "Apex", '"torch_autocast"'),
    ("elasticity.enabled", True, "elastic", "train_micro_batch_size_per_gpu"),
    ("nebula.enabled", True, "Nebula", "checkpoint_background"),
    ("graph_harvesting", True, "CUDA graphs", "remove"),
    ("sparse_gradients", True, "sparse", "remove"),
    ("sparse_attention.mode", "fixed", "sparse attention", "the model's own"),
    ("compression_training.weight_quantization.shared_parameters.enabled", True, "compression", "library"),
    ("quantize_training.enabled", True, "quantized", "before"),
    ("eigenvalue.enabled", True, "eigenvalue", "remove"),
    ("curriculum_learning.enabled", True, "curriculum", "data loader"),
    ("progressive_layer_drop.enabled", True, "layer drop", "forward"),
    ("zero_optimization.mics_shard_size", 2, "MiCS", "zeroxide.mesh.dp_shard"),
    ("zero_optimization.mics_hierarchical_params_gather", True, "MiCS", "zeroxide.mesh.dp_shard"),
]
"""Sections that DeepSpeed 0.19.8 refuses: key, value, what the line names, what it says to do."""


@pytest.mark.parametrize(("key", "value", "what", "instead"), REMOVED, ids=[each[0] for each in REMOVED])
def test_what_deepspeed_has_removed_is_refused_with_what_to_use(key, value, what, instead):
    error = complaint(nested(key, value))
    assert "neither zeroxide nor DeepSpeed 0.19.8 has it" in str(error)
    assert "not built yet" not in str(error)
    assert what in str(error)
    assert instead in str(error)
    assert key.startswith(error.path)


@pytest.mark.parametrize(("key", "value", "what"), NOT_BUILT, ids=[each[0] for each in NOT_BUILT])
def test_what_is_not_built_is_refused_by_name(key, value, what):
    error = complaint(nested(key, value))
    assert "not built yet" in str(error)
    assert what in str(error)
    assert key.startswith(error.path)


WHOLE = ("autotuning", "compile", "data_efficiency", "hybrid_engine", "weight_quantization")
"""Sections of which nothing is built."""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, {"enabled": False, "anything": [1]}) for key in WHOLE),
        *((key.split(".")[0], {"enabled": False}) for key, *_ in REMOVED if not key.startswith("zero_")),
        ("compile", {"deepcompile": False}),
        ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": False}, "groups": {}}}),
        ("torch_autocast.lower_precision_safe_modules", []),
        ("zero_optimization.mics_shard_size", -1),
        ("activation_checkpointing.partition_activations", False),
    ],
)
def test_what_is_not_built_may_be_switched_off(key, value):
    names = [name for name, _ in load(nested(key, value)).no_effect]
    assert names == [key]


@pytest.mark.parametrize("value", [True, False])
def test_true_is_not_the_number_one(value):
    assert "expected an integer" in str(complaint({"zeroxide": {"mesh": {"tp": value}}}))


def test_auto_and_null_mean_unset():
    auto = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": None}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": None},
        "wandb": "auto",
    }
    plain = {
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimization": {"stage": 3},
    }
    assert load(auto) == dataclasses.replace(load(plain), source=auto)
    assert load({"train_batch_size": "auto"}, lr=0.5).optimizer == Optimizer(lr=0.5)
    assert "unknown key" in str(complaint({"zero_optimization": {"stge": "auto"}}))
    assert "required" in str(complaint({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}))
