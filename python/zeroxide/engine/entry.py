"""`zeroxide.initialize`: from a model and a config to an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from zeroxide.engine.build import build
from zeroxide.engine.engine import Engine
from zeroxide.engine.request import Request
from zeroxide.engine.sequences import sequence_size
from zeroxide.engine.tp_model_init import with_asked
from zeroxide.errors import ModelError
from zeroxide.parallel.pipe.stages import PipelineStages
from zeroxide.zero.init.context import is_building
from zeroxide.zero.init.materialize import WeightSource

__all__ = ["initialize"]

_SHORTCUTS = (
    *("lr", "betas", "eps", "weight_decay", "offload", "offload_param", "offload_optimizer", "host_memory", "dtype"),
    *("gradient_clipping", "gradient_accumulation_steps"),
)
"""The keyword arguments that stand for keys of the config."""


def initialize(
    args: Any = None,
    model: nn.Module | PipelineStages | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., Any] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: dict[str, Any] | str | Path | None = None,
    mesh_param: Any = None,
    config_params: dict[str, Any] | str | Path | None = None,
    *,
    weights: WeightSource | None = None,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    offload: str | None = None,
    offload_param: str | None = None,
    offload_optimizer: str | None = None,
    host_memory: int | str | None = None,
    dtype: str | None = None,
    gradient_clipping: float | None = None,
    gradient_accumulation_steps: int | None = None,
) -> tuple[Engine, Any, DataLoader[Any] | None, Any]:
    """Prepares a model for training; the signature of `deepspeed.initialize`, plus keyword shortcuts.

    model: any module with floating-point parameters, all in host memory, all on the device that is to compute, or all
        on the meta device (then `weights` makes them, unit by unit), or a PipelineModule (see docs/pipeline.md). Its
        parameters move into the engine: outside of forward and backward they are empty tensors. Tied weights stay tied;
        `module.to("meta")` and `to_empty` untie them in torch 2.15, so build it there.
    optimizer: None (then the config's), a fresh torch AdamW, Adam, Adagrad or SGD, or a callable that makes one.
    model_parameters: parameters or group dicts to optimize; all trainable ones if None.
    lr_scheduler: a torch scheduler over the returned optimizer's groups, or a callable that makes one from it.
    training_data: a data set, whose part for this rank the returned loader gives, put together by `collate_fn`.
    mpu: who shares the sequences of a batch, as `UlyssesSPAttentionHF.register_with_transformers` returns it, or
        mesh_param: (data_parallel_size, sequence_parallel_size). The config's `sequence_parallel_size` says the same.
    config: DeepSpeed's JSON as a dict or a path.
    lr, betas, eps, weight_decay, gradient_clipping, gradient_accumulation_steps: as the config's keys of these names.
    dtype: what the model trains in, "bf16", "fp16" or "fp32".
    offload: "none", "cpu" or "nvme:DIR" for parameters and optimizer state together; `offload_param` and
        `offload_optimizer` for either.
    host_memory: most resident memory of the whole process, in bytes or as "2GiB".

    Where nobody asks for an optimizer, the engine is one for evaluation: its optimizer is None, and parameters take no
    gradient until it is destroyed.

    Returns (engine, optimizer, dataloader or None, lr_scheduler or None). Raises ConfigError, ModelError,
    BudgetError or StorageError, each in one line.
    """
    arguments = locals()
    shortcuts = {name: arguments[name] for name in _SHORTCUTS}
    given = config if config is not None else config_params
    checked = _checked(model)
    given = given if given is not None else getattr(args, "deepspeed_config", None)
    engine = build(
        Request(
            **checked,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            distributed_port=distributed_port,
            collate_fn=collate_fn,
            config=with_asked(checked["model"], given),
            weights=weights,
            mpu=mpu,
            sequence=sequence_size(mpu, mesh_param),
            shortcuts=shortcuts,
        )
    )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _checked(model: nn.Module | PipelineStages | None) -> dict[str, Any]:
    """The model, and its stages where it is cut. Raises ModelError where there is none."""
    if model is None:
        raise ModelError("initialize needs a model")
    if is_building():
        raise ModelError("zeroxide.initialize was called inside zero.Init: leave the context first")
    return {"model": model.module, "stages": model} if isinstance(model, PipelineStages) else {"model": model}
