"""What the config comes to: plain values that the engine reads. Nothing here parses or imports anything heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Config", "Dtype", "LossScale", "LowDtype", "Offload", "Optimizer", "Scheduler"]

Dtype = Literal["fp32", "bf16", "fp16"]
LowDtype = Literal["bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class Offload:
    """The home of one kind of state. `path` is the directory on disk, and is set exactly when `kind` is "nvme"."""

    kind: Literal["none", "cpu", "nvme"] = "none"
    path: Path | None = None

    @property
    def enabled(self) -> bool:
        """Whether the state lives somewhere else than on the compute device."""
        return self.kind != "none"

    def __str__(self) -> str:
        return f"nvme:{self.path}" if self.kind == "nvme" else self.kind


@dataclass(frozen=True, slots=True)
class LossScale:
    """How the factor on the loss is chosen that keeps small fp16 gradients from vanishing.

    A dynamic scale is halved when gradients overflow and doubled after `window` steps without an overflow, as
    `zeroxide.precision.loss_scale` counts them.
    """

    initial: float = 2.0**16
    """The scale of the first step; with `dynamic` false, that of every step."""
    dynamic: bool = True
    window: int = 1000
    """Steps in a row without an overflow after which the scale is doubled."""
    hysteresis: int = 2
    """The overflow that halves the scale: those before it only skip their steps."""
    consecutive_hysteresis: bool = False
    """Whether the overflows before it must follow one another: a good step restores the count."""
    minimum: float = 1.0
    """The scale is never halved below this."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Adam with decoupled weight decay (AdamW) or, when `decoupled` is false, with L2 regularisation (Adam)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    bias_correction: bool = True


@dataclass(frozen=True, slots=True)
class Scheduler:
    """A schedule: the class of that name in `zeroxide.optim.schedules` and its keyword arguments."""

    name: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The resolved config. Sizes are bytes; `None` means that the engine or the plan chooses."""

    stage: int = 0
    """ZeRO stage, 0 to 3."""
    precision: Dtype = "fp32"
    """dtype of weights and activations in forward and backward."""
    precision_asked: bool = False
    """Whether the user's words name it; otherwise it is that of the model's weights."""
    autocast: LowDtype | None = None
    """dtype of torch.autocast around every forward; `None` for none. The weights are fp32 then."""
    cast_inputs: bool = False
    """Whether floating-point inputs of the model are cast to `precision`."""
    loss_scale: LossScale | None = None
    """Set exactly when forward computes in fp16, as `precision` or under autocast."""
    check_overflow: bool = True
    """Whether a step whose gradients are not finite is left out."""
    format: Literal["split", "fp32"] = "fp32"
    """How the optimizer keeps exact weights: as two 16-bit halves (bf16 only) or as an fp32 master copy."""
    grad_dtype: Dtype = "fp32"
    """dtype that gradients are stored and accumulated in: that of the weights unless the config says fp32.

    In fp16, a sum over micro-batches can overflow where its terms do not; it is found like any other overflow.
    """
    reduce_dtype: Dtype = "fp32"
    """dtype in which gradients travel between ranks; they are summed in fp32."""
    reduce_sum: bool = False
    """Whether gradients are summed over ranks instead of averaged."""
    transport: Literal["auto", "shared_memory", "collective"] = "auto"
    """What carries weights and gradients between ranks: shared memory where all are on one host, if it is "auto"."""
    rank_timeout: float = 10.0
    """Seconds in which a rank gives no sign of life, or all wait for different things, until the others end."""
    buffer_dtype: Dtype | None = None
    """dtype that the model's floating-point buffers are cast to; `None` keeps each in its own."""
    keep_in_fp32: tuple[str, ...] | None = None
    """Patterns of names of buffers that are fp32 under bf16 and fp16; `None` takes the model's own lists."""

    train_batch_size: int | None = None
    """Samples per optimizer step over all processes."""
    train_micro_batch_size_per_gpu: int | None = None
    """Samples per forward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per optimizer step."""
    managed_gradient_accumulation: bool = True
    """Whether the engine counts micro-batches; otherwise every call of `step` is an optimizer step."""
    gradient_clipping: float | None = 1.0
    """Largest global gradient norm; `None` leaves gradients as they are."""
    clipping_is_default: bool = True
    """Whether nobody asked for that norm."""
    compute_grad_norm: bool = True
    """Whether the global gradient norm is told to those who ask."""
    dataloader_drop_last: bool = False
    """Whether the data loader drops a last batch that is not full."""

    optimizer: Optimizer | None = None
    """`None` when neither the config nor a shortcut asks for one."""
    scheduler: Scheduler | None = None

    offload_param: Offload = field(default_factory=Offload)
    offload_optimizer: Offload = field(default_factory=Offload)
    leaf_classes: tuple[str, ...] = ()
    """Classes of modules that are gathered whole, as "Name" or "module.path.Name"."""
    leaf_names: tuple[str, ...] = ()
    """Full names of modules that are gathered whole."""
    leaf_suffixes: tuple[str, ...] = ()
    """What names of modules that are gathered whole end in."""
    host_memory: int | None = None
    """Budget for the whole process's resident memory; `None` sets no limit."""
    unit_bytes: int | None = None
    """Largest flat buffer of weights that is gathered in one piece."""
    staging_bytes: int | None = None
    """Size of the ring through which all disk traffic goes."""
    tile_bytes: int | None = None
    """Size of one disk request and of one optimizer task."""
    prefetch: int = 1
    """How many units are read ahead of the one in use."""
    io_engine: Literal["auto", "io_uring", "threads"] = "auto"
    queue_depth: int = 32
    """Most disk requests in flight at once."""
    threads: int | None = None
    """Optimizer threads; `None` is one for each CPU that the process may use."""
    trim_libraries: bool = True
    """Whether pages of shared libraries that were touched only while importing are dropped from the resident set."""

    checkpoint_background: bool = False
    """Whether training goes on while a checkpoint is written."""
    checkpoint_memory: int | None = None
    """Most memory in which state waits to be written; `None` is half of what is free, within `host_memory`."""

    steps_per_print: int | None = None
    """Optimizer steps between progress lines; `None` prints none."""
    wall_clock_breakdown: bool = False
    """Whether progress lines carry the time of forward, backward and step."""

    no_effect: list[tuple[str, str]] = field(default_factory=list)
    """Keys that were accepted and do nothing, each with the reason, in the order of the schema."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The config as the user gave it, parsed but not changed."""
