"""The data loader and the schedule that come with an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from zeroxide.config import Config
from zeroxide.data.sampler import EpochSampler, ShardedIterable
from zeroxide.distributed import Group, Ranks, agree, sampler_facts
from zeroxide.engine.accumulation import micro_batch_of
from zeroxide.errors import ConfigError, DataError

__all__ = ["Loaders", "check_schedule", "schedule_for"]


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


@dataclass(frozen=True)
class Loaders:
    """Makes loaders of this rank's share of a data set."""

    config: Config
    collate_fn: Callable[..., Any] | None
    """What makes a batch of samples where a caller does not say; None for torch's own."""
    ranks: Ranks
    group: Group
    """The ranks that take different samples, of all `ranks`."""

    def training(self, data: Any) -> DataLoader[Any] | None:
        """A loader in batches of one forward, in another order at every pass; None without data. See `make`."""
        return None if data is None else self.make(data)

    def make(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        in_order: bool = False,
        sampler: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        pin_memory: bool = False,
        num_workers: int = 0,
    ) -> DataLoader[Any]:
        """A loader of this rank's share of `data`.

        batch_size: samples of a batch; those of one forward if None.
        in_order: whether samples come in their own order. Then ranks get equally many, the first samples again where
            they do not divide.
        sampler: whose indices are taken instead, as they are: whoever gives one shares the samples out.

        Raises ConfigError without a batch size, DataError where there is no whole batch, and RanksError on all ranks
        where they would draw differently.
        """
        batch = micro_batch_of(self.config) if batch_size is None else batch_size
        drop_last, group = self.config.batch.dataloader_drop_last, self.group
        if hasattr(data, "__len__") and sampler is None:
            size = math.ceil(len(data) / group.size)
            if (size // batch if drop_last else math.ceil(size / batch)) == 0:
                raise DataError(
                    f"the data has {size} samples for each of {group.size} ranks and a micro-batch takes {batch}: "
                    "there is no batch"
                )
        mapped = not isinstance(data, torch.utils.data.IterableDataset)
        # Data sets of Hugging Face say themselves when they are one rank's share.
        if not mapped and group.size > 1 and getattr(data, "_distributed", None) is None:
            data = ShardedIterable(data, group.position, group.size)
        shared = None
        # Also where no ranks take other samples, and several take the same ones.
        if mapped and self.ranks.world > 1 and sampler is None:
            shared = EpochSampler(data, group.size, group.position, shuffle=not in_order, drop_last=drop_last)
        agree(self.ranks, {} if shared is None else sampler_facts(shared))
        return DataLoader(
            data,
            batch_size=batch,
            shuffle=mapped and not in_order and shared is None and sampler is None,
            sampler=shared if sampler is None else sampler,
            drop_last=drop_last,
            collate_fn=self.collate_fn if collate_fn is None else collate_fn,
            pin_memory=pin_memory,
            num_workers=num_workers,
        )
