"""The micro-batches of one optimizer step: where they come from, and how a model makes a loss of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from zeroxide.distributed import Ranks, Watch
from zeroxide.errors import DataError, ModelError

__all__ = ["Feed", "loss_of"]


class Feed:
    """Pulls micro-batches. `loader` is the engine's own."""

    def __init__(self, loader: DataLoader[Any] | None, ranks: Ranks, watch: Watch) -> None:
        self._loader = loader
        self._ranks = ranks
        self._watch = watch
        self._own: Iterator[Any] | None = None

    def pull(self, data_iter: Any, count: int) -> list[Any]:
        """The next `count` micro-batches of `data_iter`, or of the engine's loader, which begins anew at its end.

        Raises StopIteration, on all ranks, where a rank has fewer, and DataError without a loader.
        """
        if data_iter is None:
            return self._pull_own(count)
        batches: list[Any] = []
        ended = False
        iterator = iter(data_iter)
        while len(batches) < count and not ended:
            try:
                batches.append(next(iterator))
            except StopIteration:
                ended = True
        found = [len(batches)]
        if not self._ranks.alone:
            with self._watch.waiting("the number of micro-batches", "train_batch"):
                found = self._ranks.gather_objects(len(batches))
        if min(found) < count:
            rank = found.index(min(found))
            on = f" on rank {rank}" if self._ranks.world > 1 else ""
            raise StopIteration(
                f"train_batch: the iterator{on} ended after {found[rank]} of {count} micro-batches: these were left out"
            )
        return batches

    def _pull_own(self, count: int) -> list[Any]:
        if self._loader is None:
            raise DataError(
                "train_batch: no micro-batches: pass an iterator, as train_batch(iter(loader)), or give training_data "
                "to zeroxide.initialize"
            )
        batches: list[Any] = []
        while len(batches) < count:
            if self._own is None:
                self._own = iter(self._loader)
            try:
                batches.append(next(self._own))
            except StopIteration:
                self._own = None
        return batches


def loss_of(model: Callable[..., Any], batch: Any, loss_fn: Callable[[Any, Any], torch.Tensor] | None) -> torch.Tensor:
    """The loss of one micro-batch.

    Without `loss_fn` the batch is all that the model takes, and its output is the loss, or has it as `loss`, under
    "loss", or first. With it the batch is (inputs, labels), and the loss is loss_fn(outputs, labels). Inputs are the
    keyword arguments of a mapping, the positional ones of a tuple or list, or one argument.

    Raises DataError for a batch that is no pair, ModelError for an output without a loss, ValueError for a loss that is
    no scalar.
    """
    if loss_fn is None:
        loss = _found_in(_called(model, batch))
    else:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(
                f"train_batch: expected a micro-batch of (inputs, labels) for loss_fn, got {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
            )
        loss = loss_fn(_called(model, batch[0]), batch[1])
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"train_batch: expected a scalar loss, got {shape}")
    return loss


def _called(model: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def _found_in(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None and isinstance(output, tuple | list) and output:
        loss = output[0]
    if loss is None:
        raise ModelError(
            f"train_batch: the model's output, a {type(output).__name__}, has no loss: pass loss_fn, and micro-batches "
            "of (inputs, labels)"
        )
    return loss
