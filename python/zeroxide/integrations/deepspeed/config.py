"""`deepspeed.runtime.config.DeepSpeedConfig`: what a config comes to, under DeepSpeed's names for its parts."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from zeroxide.config import Config, Offload, load
from zeroxide.integrations.deepspeed.offload_states import OffloadDeviceEnum

__all__ = ["DeepSpeedConfig"]


@dataclass(frozen=True)
class OffloadConfig:
    """Where one kind of state is at home."""

    device: OffloadDeviceEnum
    nvme_path: Path | None


@dataclass(frozen=True)
class ZeroConfig:
    """The section `zero_optimization`."""

    stage: int
    offload_param: OffloadConfig | None
    offload_optimizer: OffloadConfig | None


@dataclass(frozen=True)
class Float16Config:
    """The section `fp16`; `loss_scale` 0 is one that moves."""

    enabled: bool
    loss_scale: float = 0.0
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: float = 1.0


@dataclass(frozen=True)
class Bfloat16Config:
    """The section `bf16`."""

    enabled: bool


class DeepSpeedConfig:
    """What an engine would take a config for. It reads the config as `initialize` does, and refuses what that refuses.

    config: a mapping, or the path of a JSON file. mpu: an object whose `get_data_parallel_world_size()`, or whose
    `get_sequence_parallel_world_size()` beside all ranks, tells how many ranks take different samples; mesh_device: a
    device mesh with a dimension "data_parallel" of them. Without either they follow from the process group and the
    config; without a process group there is one rank.

    Attributes are those of DeepSpeed 0.19.8 for what zeroxide has; its other ones are refused by name.
    Raises ConfigError.
    """

    def __init__(
        self, config: Mapping[str, Any] | str | os.PathLike[str], mpu: Any = None, mesh_device: Any = None
    ) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.global_rank = dist.get_rank() if there else 0
        ranks, sequence = dist.get_world_size() if there else 1, None
        if mpu is not None:
            if hasattr(mpu, "get_data_parallel_world_size"):
                ranks = mpu.get_data_parallel_world_size()
            else:
                sequence = mpu.get_sequence_parallel_world_size()
        elif mesh_device is not None:
            ranks = mesh_device.get_group(mesh_dim="data_parallel").size()
        found = load(config, world_size=ranks, sequence=sequence)
        self._param_dict: dict[str, Any] = copy.deepcopy(dict(found.source))
        self._take(found)
        self.world_size = ranks if sequence is None else ranks // sequence

    def _take(self, found: Config) -> None:
        batch = found.batch
        self.train_batch_size = batch.train_batch_size
        self.train_micro_batch_size_per_gpu = batch.train_micro_batch_size_per_gpu
        self.gradient_accumulation_steps = batch.gradient_accumulation_steps
        self.managed_gradient_accumulation = batch.managed_gradient_accumulation
        self.dataloader_drop_last = batch.dataloader_drop_last
        self.gradient_clipping = found.gradients.clipping or 0.0
        self.steps_per_print = found.report.steps_per_print
        self.wall_clock_breakdown = found.report.wall_clock_breakdown or found.flops_profiler.enabled

        zero = found.zero
        self.zero_optimization_stage = zero.stage
        self.zero_enabled = zero.stage > 0
        self.zero_config = ZeroConfig(zero.stage, _offload(zero.offload_param), _offload(zero.offload_optimizer))
        self.float16_config = _float16(found)
        self.bfloat16_config = Bfloat16Config(found.precision.dtype == "bf16")

        optimizer, scheduler = self._param_dict.get("optimizer"), self._param_dict.get("scheduler")
        self.optimizer_name = None if optimizer is None else str(optimizer["type"]).lower()
        self.optimizer_params = None if optimizer is None else optimizer.get("params")
        self.scheduler_name = None if scheduler is None else scheduler["type"]
        self.scheduler_params = None if scheduler is None else scheduler.get("params")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"DeepSpeedConfig.{name} is not built in zeroxide: the config as it was given is in `_param_dict`, and "
            "what counts is in `resolved_config` of an engine",
            name=name,
            obj=self,
        )


def _offload(home: Offload) -> OffloadConfig | None:
    return OffloadConfig(OffloadDeviceEnum(home.kind), home.path) if home.enabled else None


def _float16(found: Config) -> Float16Config:
    precision = found.precision
    scale = precision.loss_scale
    if precision.dtype != "fp16" or scale is None:
        return Float16Config(enabled=False)
    if not scale.dynamic:
        return Float16Config(enabled=True, loss_scale=scale.initial)
    return Float16Config(
        enabled=True,
        initial_scale_power=round(math.log2(scale.initial)),
        loss_scale_window=scale.window,
        hysteresis=scale.hysteresis,
        consecutive_hysteresis=scale.consecutive_hysteresis,
        min_loss_scale=scale.minimum,
    )
