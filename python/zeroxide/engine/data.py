"""The data loader and the schedule that come with an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from zeroxide.config import Config
from zeroxide.data.sampler import EpochSampler, ShardedIterable
from zeroxide.distributed import Group, Ranks, agree, sampler_facts
from zeroxide.engine.accumulation import micro_batch_of
from zeroxide.errors import ConfigError, DataError

__all__ = ["check_schedule", "loader_for", "schedule_for"]


def schedule_for(config: Config, given: Any, optimizer: torch.optim.Optimizer | None) -> Any:
    """The schedule over the engine's optimizer: the one given, what the callable given makes, or the config's.

    None where there is none. Raises ConfigError for a schedule without an optimizer.
    """
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


def check_schedule(given: Any, optimizer: Any) -> None:
    """Raises ConfigError for a schedule over another optimizer than `optimizer`, whose groups the engine takes over."""
    driven = getattr(given, "optimizer", None)
    if not _makes_schedule(given) and driven is not None and driven is not optimizer:
        raise ConfigError(
            "lr_scheduler was made over an optimizer that the engine does not have: pass that optimizer as well, or a "
            "callable that makes the schedule from the engine's",
            path="lr_scheduler",
        )


def loader_for(
    config: Config, data: Any, collate_fn: Callable[..., Any] | None, ranks: Ranks, group: Group
) -> DataLoader[Any] | None:
    """A loader of this rank's share of `data`, in batches of one forward; None without data.

    group: the ranks that take different samples, of all `ranks`.

    Raises ConfigError without a batch size, DataError where there is no whole batch, and RanksError on all ranks where
    they would draw differently.
    """
    if data is None:
        return None
    batch = micro_batch_of(config)
    if hasattr(data, "__len__"):
        size = math.ceil(len(data) / group.size)
        batches = size // batch if config.batch.dataloader_drop_last else math.ceil(size / batch)
        if batches == 0:
            raise DataError(
                f"training_data has {size} samples for each of {group.size} ranks and a micro-batch takes {batch}: "
                "there is no batch"
            )
    sampler: DistributedSampler[Any] | None = None
    shuffle = not isinstance(data, torch.utils.data.IterableDataset)
    # Data sets of Hugging Face say themselves when they are one rank's share.
    if not shuffle and group.size > 1 and getattr(data, "_distributed", None) is None:
        data = ShardedIterable(data, group.position, group.size)
    if shuffle and group.size > 1:
        sampler = EpochSampler(data, group.size, group.position, drop_last=config.batch.dataloader_drop_last)
    agree(ranks, {} if sampler is None else sampler_facts(sampler))
    return DataLoader(
        data,
        batch_size=batch,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        drop_last=config.batch.dataloader_drop_last,
        collate_fn=collate_fn,
    )
