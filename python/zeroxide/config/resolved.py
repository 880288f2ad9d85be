"""What the config comes to: plain values that the engine reads. Nothing here parses or imports anything heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Config", "Dtype", "Offload", "Optimizer", "Scheduler"]

Dtype = Literal["fp32", "bf16"]


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
    format: Literal["split", "fp32"] = "fp32"
    """How the optimizer keeps exact weights: as two 16-bit halves (bf16 only) or as an fp32 master copy."""
    grad_dtype: Dtype = "fp32"
    """dtype that gradients are stored and accumulated in."""
    reduce_dtype: Dtype = "fp32"
    """dtype in which gradients travel between ranks; they are summed in fp32."""
    reduce_sum: bool = False
    """Whether gradients are summed over ranks instead of averaged."""
    transport: Literal["auto", "shared_memory", "collective"] = "auto"
    """What carries weights and gradients between ranks: shared memory where all are on one host, if it is "auto"."""
    rank_timeout: float = 10.0
    """Seconds in which a rank gives no sign of life, or all wait for different things, until the others end."""
    buffer_dtype: Dtype = "fp32"
    """dtype that the model's floating-point buffers are cast to."""

    train_batch_size: int | None = None
    """Samples per optimizer step over all processes."""
    train_micro_batch_size_per_gpu: int | None = None
    """Samples per forward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per optimizer step."""
    gradient_clipping: float | None = None
    """Largest global gradient norm; `None` leaves gradients as they are."""
    dataloader_drop_last: bool = False
    """Whether the data loader drops a last batch that is not full."""

    optimizer: Optimizer | None = None
    """`None` when neither the config nor a shortcut asks for one."""
    scheduler: Scheduler | None = None

    offload_param: Offload = field(default_factory=Offload)
    offload_optimizer: Offload = field(default_factory=Offload)
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
    trim_libraries: bool = False
    """Whether pages of shared libraries that were touched only while importing are dropped from the resident set."""

    steps_per_print: int | None = 10
    """Optimizer steps between progress lines; `None` prints none."""
    wall_clock_breakdown: bool = False
    """Whether progress lines carry the time of forward, backward and step."""

    no_effect: list[tuple[str, str]] = field(default_factory=list)
    """Keys that were accepted and do nothing, each with the reason, in the order of the schema."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The config as the user gave it, parsed but not changed."""
