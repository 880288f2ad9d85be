"""`zeroxide.initialize`: from a model and a config to an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from zeroxide.config import Config, load
from zeroxide.config.facts import config_facts
from zeroxide.data.sampler import EpochSampler, ShardedIterable
from zeroxide.distributed import Ranks, agree, model_facts, sampler_facts, start, version_facts
from zeroxide.engine.accumulation import micro_batch_of
from zeroxide.engine.engine import Engine
from zeroxide.engine.evaluation import freeze, thaw
from zeroxide.errors import ConfigError, ModelError
from zeroxide.precision.policy import check_batch_norms, check_shapes, own_dtype
from zeroxide.zero.init.context import is_building
from zeroxide.zero.init.materialize import WeightSource

__all__ = ["initialize"]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
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

    model: any module with floating-point parameters, all in host memory or all on the meta device (then `weights`
        makes them). Its parameters move into the engine: outside of forward and backward they are empty tensors.
    optimizer: None (then the config's), a fresh torch AdamW or Adam, or a callable that makes one.
    model_parameters: parameters or group dicts to optimize; all trainable ones if None.
    lr_scheduler: a torch scheduler over the returned optimizer's groups, or a callable that makes one from it.
    config: DeepSpeed's JSON as a dict or a path.
    offload: "none", "cpu" or "nvme:DIR" for parameters and optimizer state together.
    host_memory: most resident memory of the whole process, in bytes or as "2GiB".

    Where nobody asks for an optimizer, the engine is one for evaluation: its optimizer is None, and parameters take no
    gradient until it is destroyed.

    Returns (engine, optimizer, dataloader or None, lr_scheduler or None). Raises ConfigError, ModelError,
    BudgetError or StorageError, each in one line.
    """
    if model is None:
        raise ModelError("initialize needs a model")
    if is_building():
        raise ModelError("zeroxide.initialize was called inside zero.Init: leave the context first")
    if mpu is not None or mesh_param is not None:
        name = "mpu" if mpu is not None else "mesh_param"
        raise ConfigError(f"{name}: model parallelism is not built yet", path=name)
    chosen = config if config is not None else config_params
    if chosen is None:
        chosen = getattr(args, "deepspeed_config", None)
    check_shapes(model)
    with ExitStack() as undo:
        ranks = start(port=distributed_port)
        undo.callback(ranks.close)
        resolved = load(
            chosen,
            world_size=ranks.world,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            offload=offload,
            offload_param=offload_param,
            offload_optimizer=offload_optimizer,
            host_memory=host_memory,
            dtype=dtype,
            gradient_clipping=gradient_clipping,
            gradient_accumulation_steps=gradient_accumulation_steps,
            own_dtype=partial(own_dtype, model),
        )
        given = {"sampler.training_data": "none" if training_data is None else "given"}
        # The model before the config, in which its dtype may be.
        agree(ranks, {**version_facts(), **model_facts(model), **config_facts(resolved), **given})
        # What can be refused is refused before the engine takes the weights over.
        _check_schedule(lr_scheduler, optimizer)
        check_batch_norms(model, resolved)
        loader = _loader(resolved, training_data, collate_fn, ranks)
        # Without an optimizer nothing is trained: no memory is kept for gradients and state.
        set_aside = freeze(model) if optimizer is None and resolved.optimizer is None else []
        undo.callback(thaw, model, set_aside)
        engine = Engine(
            model,
            resolved,
            optimizer=optimizer,
            parameters=model_parameters,
            weights=weights,
            ranks=ranks,
            scheduler=lambda made: _scheduler(resolved, lr_scheduler, made),
        )
        engine.set_aside = set_aside
        engine.training_dataloader = loader
        undo.pop_all()
        return engine, engine.optimizer, loader, engine.lr_scheduler


def _scheduler(config: Config, given: Any, optimizer: torch.optim.Optimizer | None) -> Any:
    """The schedule over the engine's optimizer."""
    if given is None and config.scheduler is None:
        return None
    if optimizer is None:
        raise ConfigError("a schedule needs an optimizer: the config has none", path="scheduler")
    if given is None:
        assert config.scheduler is not None
        from zeroxide.optim import schedules

        return getattr(schedules, config.scheduler.name)(optimizer, **config.scheduler.params)
    return given(optimizer) if _makes_schedule(given) else given


def _makes_schedule(given: Any) -> bool:
    return callable(given) and not hasattr(given, "step")


def _check_schedule(given: Any, optimizer: Any) -> None:
    """Raises ConfigError for a schedule over another optimizer than `optimizer`, whose groups the engine takes over."""
    driven = getattr(given, "optimizer", None)
    if not _makes_schedule(given) and driven is not None and driven is not optimizer:
        raise ConfigError(
            "lr_scheduler was made over an optimizer that the engine does not have: pass that optimizer as well, or a "
            "callable that makes the schedule from the engine's",
            path="lr_scheduler",
        )


def _loader(config: Config, data: Any, collate_fn: Callable[..., Any] | None, ranks: Ranks) -> DataLoader[Any] | None:
    if data is None:
        return None
    batch = micro_batch_of(config)
    if hasattr(data, "__len__"):
        size = math.ceil(len(data) / ranks.world)
        batches = size // batch if config.batch.dataloader_drop_last else math.ceil(size / batch)
        if batches == 0:
            from zeroxide.errors import DataError

            raise DataError(
                f"training_data has {size} samples for each of {ranks.world} ranks and a micro-batch takes {batch}: "
                "there is no batch"
            )
    sampler: DistributedSampler[Any] | None = None
    shuffle = not isinstance(data, torch.utils.data.IterableDataset)
    # Data sets of Hugging Face say themselves when they are one rank's share.
    if not shuffle and ranks.world > 1 and getattr(data, "_distributed", None) is None:
        data = ShardedIterable(data, ranks.rank, ranks.world)
    if shuffle and ranks.world > 1:
        sampler = EpochSampler(data, ranks.world, ranks.rank, drop_last=config.batch.dataloader_drop_last)
    agree(ranks, {} if sampler is None else sampler_facts(sampler))
    return DataLoader(
        data,
        batch_size=batch,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        drop_last=config.batch.dataloader_drop_last,
        collate_fn=collate_fn,
    )
