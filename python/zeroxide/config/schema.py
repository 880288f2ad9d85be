"""The config file, key by key: DeepSpeed's JSON plus the section `zeroxide`.

A field without a mark has an effect and ends up in `zeroxide.config.Config`. `NoEffect` and `NotBuilt` say why another
one has none. Types that only unbuilt or ineffective keys need are left open on purpose.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from zeroxide.config.fields import (
    LARGEST_COUNT,
    Betas,
    ByteSize,
    Count,
    Flag,
    MemorySize,
    NoEffect,
    NonNegative,
    NotBuilt,
    PrintInterval,
    Rates,
    Removed,
    Seconds,
    Section,
    WholeNumber,
    choice,
    expecting,
    whole,
)
from zeroxide.config.schema_precision import Bf16, DataTypes, DtypeName, Fp16, TorchAutocast
from zeroxide.config.schema_zero import ZeroOptimization, stage_of_switch

__all__ = ["Document", "OptimizerParams", "SchedulerParams", "WarmupCosineParams", "WarmupDecayParams", "WarmupParams"]

_MONITOR = "monitors (metrics go to the JSONL log)"


def _warmup_type(value: Any) -> str:
    """As DeepSpeed compares names, with their case: of another case is not its "linear", and gives its default."""
    if value in ("log", "linear"):
        return str(value)
    if isinstance(value, str) and value.lower() in ("log", "linear"):
        return "log"
    raise ValueError


WarmupType = Annotated[Literal["log", "linear"], PlainValidator(_warmup_type), expecting('"log" or "linear"')]


_BATCH_KEYS = "train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps"
_USE_SPARSE = "remove the key: rows of an embedding's gradient are always kept sparse"
_USE_LOADER = "order the data in the data loader"


class OptimizerParams(Section):
    """`optimizer.params` for Adam and AdamW."""

    lr: NonNegative | None = None
    betas: Betas | None = None
    eps: NonNegative | None = None
    weight_decay: NonNegative | None = None
    bias_correction: Flag | None = None
    adam_w_mode: Flag | None = None
    amsgrad: Annotated[Flag | None, NotBuilt("AMSGrad")] = None
    fp32_optimizer_states: Annotated[Flag | None, NotBuilt("optimizer states below fp32", neutral=(True,))] = None
    torch_adam: Flag | None = None
    fused: Annotated[Any, NoEffect("the update is always one fused pass")] = None
    foreach: Annotated[Any, NoEffect("the update is always one fused pass")] = None
    capturable: Annotated[Any, NoEffect("the update is not part of a CUDA graph")] = None
    differentiable: Annotated[Any, NotBuilt("differentiating through the optimizer")] = None
    maximize: Annotated[Flag | None, NotBuilt("maximising the loss")] = None


class Optimizer(Section):
    """`optimizer`. The keys of `params` depend on `type` and are checked once that is known."""

    type: Annotated[str, expecting("the name of an optimizer")]
    params: Annotated[dict[str, Any], expecting("an object")] = Field(default_factory=dict)
    legacy_fusion: Annotated[Any, NoEffect("the update is always one fused pass")] = None


class SchedulerParams(Section):
    """What the three warm-up schedules share."""

    warmup_num_steps: Count | None = None
    warmup_type: WarmupType | None = None
    last_batch_iteration: (
        Annotated[
            int,
            BeforeValidator(whole),
            Field(ge=-1, le=LARGEST_COUNT),
            expecting(f"an integer from -1 to {LARGEST_COUNT}"),
        ]
        | None
    ) = None


class WarmupParams(SchedulerParams):
    """`WarmupLR`: from `warmup_min_lr` to `warmup_max_lr`, then constant."""

    warmup_min_lr: Rates | None = None
    warmup_max_lr: Rates | None = None


class WarmupDecayParams(WarmupParams):
    """`WarmupDecayLR`: warm-up, then a straight line to 0 at `total_num_steps`."""

    total_num_steps: Count


class WarmupCosineParams(SchedulerParams):
    """`WarmupCosineLR`: warm-up to the optimizer's rate, then half a cosine down to `cos_min_ratio` of it."""

    total_num_steps: Count
    warmup_min_ratio: Annotated[float, Field(ge=0, le=1), expecting("a number from 0 to 1")] | None = None
    cos_min_ratio: Annotated[float, Field(ge=0, le=1), expecting("a number from 0 to 1")] | None = None


class Scheduler(Section):
    """`scheduler`. The keys of `params` depend on `type` and are checked once that is known."""

    type: Annotated[str, expecting("the name of a schedule")]
    params: Annotated[dict[str, Any], expecting("an object")] = Field(default_factory=dict)


class Aio(Section):
    """`aio`: the disk queue."""

    queue_depth: Annotated[Count, Field(le=4096), expecting("an integer from 1 to 4096")] | None = None
    block_size: Annotated[Any, NoEffect("a request carries one tile; see zeroxide.tile_bytes")] = None
    intra_op_parallelism: Annotated[Any, NoEffect("the queue keeps queue_depth requests in flight by itself")] = None
    thread_count: Annotated[Any, NoEffect("the queue keeps queue_depth requests in flight by itself")] = None
    single_submit: Annotated[Any, NoEffect("requests are submitted in batches as they come")] = None
    overlap_events: Annotated[Any, NoEffect("submission and completion always overlap")] = None
    use_gds: Annotated[Flag | None, NotBuilt("GPUDirect Storage")] = None


class ActivationCheckpointing(Section):
    """`activation_checkpointing`: the model's own checkpointing works as it is; nothing here changes it yet."""

    partition_activations: Annotated[Flag | None, NotBuilt("partitioned activations")] = None
    contiguous_memory_optimization: Annotated[Flag | None, NotBuilt("contiguous activation buffers")] = None
    cpu_checkpointing: Annotated[Flag | None, NotBuilt("activation offload")] = None
    number_checkpoints: Annotated[Any, NoEffect("only sizes contiguous activation buffers")] = None
    synchronize_checkpoint_boundary: Annotated[Any, NoEffect("checkpoint boundaries need no synchronisation")] = None
    profile: Annotated[Any, NoEffect("use torch.profiler")] = None


_WRITER = "checkpoints are written by zeroxide's own writer"


class CheckpointWriter(Section):
    """`checkpoint.writer`: whether training goes on while a checkpoint is written."""

    decoupled: Flag | None = None
    type: Annotated[Any, NoEffect(_WRITER)] = None
    io_buffer_size: Annotated[Any, NoEffect(_WRITER)] = None
    io_buffer_double: Annotated[Any, NoEffect(_WRITER)] = None
    io_multiplier: Annotated[Any, NoEffect(_WRITER)] = None
    show_statistics: Annotated[Any, NoEffect("engine.checkpoint_stats() always has them")] = None
    data_parallel: Annotated[Any, NoEffect("every process writes its own shard")] = None


class Checkpoint(Section):
    """`checkpoint`: how checkpoints are written."""

    tag_validation: Annotated[Any, NoEffect("ranks that disagree about the tag are always refused")] = None
    load_universal: Annotated[Flag | None, NotBuilt("loading DeepSpeed's universal checkpoints")] = None
    use_node_local_storage: Annotated[Flag | None, NotBuilt("checkpoints spread over node-local disks")] = None
    parallel_write: Annotated[Any, NoEffect("every process writes its own shard")] = None
    checkpoint_serialization: Annotated[Any, NoEffect(_WRITER)] = None
    writer: CheckpointWriter | None = None


class Zeroxide(Section):
    """`zeroxide`: what DeepSpeed has no key for."""

    host_memory: MemorySize | None = None
    format: Annotated[Literal["split", "fp32"] | None, choice("split", "fp32")] = None
    io_engine: Annotated[Literal["auto", "io_uring", "threads"], choice("auto", "io_uring", "threads")] = "auto"
    threads: Annotated[Count, Field(le=4096), expecting("an integer from 1 to 4096")] | None = None
    unit_bytes: MemorySize | None = None
    tile_bytes: ByteSize | None = None
    staging_bytes: MemorySize | None = None
    prefetch: Annotated[WholeNumber, Field(le=1024), expecting("an integer from 0 to 1024")] | None = None
    trim_libraries: Flag = True
    transport: Annotated[
        Literal["auto", "shared_memory", "collective"], choice("auto", "shared_memory", "collective")
    ] = "auto"
    checkpoint_background: Flag | None = None
    checkpoint_memory: MemorySize | None = None
    rank_timeout: Seconds | None = None


class Document(Section):
    """The whole config."""

    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None
    managed_gradient_accumulation: Flag = True
    gradient_clipping: NonNegative | None = None
    steps_per_print: PrintInterval = None
    wall_clock_breakdown: Flag = False
    dataloader_drop_last: Flag = False
    bf16: Bf16 | None = None
    bfloat16: Bf16 | None = None
    fp16: Fp16 | None = None
    torch_autocast: TorchAutocast | None = None
    data_types: DataTypes | None = None
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    zero_optimization: Annotated[ZeroOptimization | None, BeforeValidator(stage_of_switch)] = None
    aio: Aio | None = None
    activation_checkpointing: ActivationCheckpointing | None = None
    checkpoint: Checkpoint | None = None
    zeroxide: Zeroxide | None = None
    communication_data_type: DtypeName | None = None
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], choice("mean", "sum")] = "mean"

    # Switches that do nothing here.
    zero_allow_untested_optimizer: Annotated[Flag | None, NoEffect("an optimizer works or is refused by name")] = None
    zero_force_ds_cpu_optimizer: Annotated[Flag | None, NoEffect("offloaded state always has its own kernel")] = None
    prescale_gradients: Annotated[Flag | None, NoEffect("gradients are summed in fp32 and scaled once")] = None
    gradient_predivide_factor: Annotated[Any, NoEffect("gradients are summed in fp32 and scaled once")] = None
    seq_parallel_communication_data_type: Annotated[Any, NoEffect("gradients are summed in fp32")] = None
    disable_allgather: Annotated[Any, NoEffect("a unit is gathered by one collective")] = None
    memory_breakdown: Annotated[Flag | None, NoEffect("engine.memory() always has it")] = None
    dump_state: Annotated[Flag | None, NoEffect("print engine.plan() instead")] = None
    log_level: Annotated[Any, NoEffect("set the level of Python's logger 'zeroxide'")] = None
    vocabulary_size: Annotated[Any, NoEffect("it only feeds a warning in DeepSpeed")] = None
    timers: Annotated[Any, NoEffect("throughput is timed without synchronising")] = None

    # What is not built yet.
    sequence_parallel_size: Annotated[Count | None, NotBuilt("sequence parallelism", neutral=(1,))] = None
    data_parallel_size: Annotated[Count | None, NotBuilt("a mesh of several processes", neutral=(1,))] = None
    use_data_before_expert_parallelism: Annotated[Any, NotBuilt("expert parallelism")] = None
    pipeline: Annotated[Any, NotBuilt("pipeline parallelism")] = None
    tensor_parallel: Annotated[Any, NotBuilt("tensor parallelism")] = None
    expert_parallel: Annotated[Any, NotBuilt("expert parallelism")] = None
    compile: Annotated[Any, NotBuilt("compiled graphs")] = None
    hybrid_engine: Annotated[Any, NotBuilt("the hybrid engine")] = None
    weight_quantization: Annotated[Any, NotBuilt("weight quantization")] = None
    data_efficiency: Annotated[Any, NotBuilt("data sampling and routing")] = None
    autotuning: Annotated[Any, NotBuilt("autotuning")] = None
    flops_profiler: Annotated[Any, NotBuilt("the FLOPs profiler")] = None
    comms_logger: Annotated[Any, NotBuilt("the communication log")] = None
    datastates_ckpt: Annotated[Any, NotBuilt("external checkpoint engines")] = None
    tensorboard: Annotated[Any, NotBuilt(_MONITOR)] = None
    wandb: Annotated[Any, NotBuilt(_MONITOR)] = None
    csv_monitor: Annotated[Any, NotBuilt(_MONITOR)] = None
    comet: Annotated[Any, NotBuilt(_MONITOR)] = None
    monitor_config: Annotated[Any, NotBuilt(_MONITOR)] = None

    # What DeepSpeed 0.19.8 refuses by name, on or off.
    amp: Annotated[Any, Removed("Apex AMP", instead='use "bf16", "fp16" or "torch_autocast"')] = None
    elasticity: Annotated[Any, Removed("elastic batch sizes", instead=f"set {_BATCH_KEYS}")] = None
    nebula: Annotated[Any, Removed("Nebula checkpoints", instead='use "zeroxide.checkpoint_background"')] = None
    graph_harvesting: Annotated[Any, Removed("CUDA graphs")] = None
    sparse_gradients: Annotated[Any, Removed("sparse embedding gradients", instead=_USE_SPARSE)] = None
    sparse_attention: Annotated[Any, Removed("sparse attention", instead="use the model's own attention")] = None
    compression_training: Annotated[Any, Removed("compression", instead="compress with a library for it")] = None
    quantize_training: Annotated[Any, Removed("quantized training", instead="quantize the model before")] = None
    eigenvalue: Annotated[Any, Removed("eigenvalue estimates")] = None
    curriculum_learning: Annotated[Any, Removed("curriculum learning", instead=_USE_LOADER)] = None
    progressive_layer_drop: Annotated[Any, Removed("progressive layer drop", instead="drop layers in forward")] = None
