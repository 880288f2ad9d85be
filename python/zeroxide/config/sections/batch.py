"""Batch sizes and accumulation: keys at the top of the document."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Count, Flag, Section
from zeroxide.config.given import Given, agree
from zeroxide.errors import ConfigError

__all__ = ["Batch", "BatchKeys", "resolve"]


class BatchKeys(Section):
    """The keys."""

    train_batch_size: Count | None = None
    """Samples in an optimizer step over all ranks: the product of the next two and the number of ranks."""
    train_micro_batch_size_per_gpu: Count | None = None
    """Samples in one forward pass of one rank."""
    gradient_accumulation_steps: Count | None = None
    """Forward and backward passes in an optimizer step."""
    managed_gradient_accumulation: Flag = True
    """Whether the engine counts micro-batches; otherwise every call of `step` is an optimizer step."""
    dataloader_drop_last: Flag = False
    """Whether the data loader drops a last batch that is not full."""


@dataclass(frozen=True)
class Batch(Resolved):
    """Batch sizes; `train_batch_size` is the product of the next two and the world size."""

    key: ClassVar[str] = ""

    train_batch_size: int | None = None
    """Samples per optimizer step over all processes."""
    train_micro_batch_size_per_gpu: int | None = None
    """Samples per forward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per optimizer step."""
    managed_gradient_accumulation: bool = True
    """Whether the engine counts micro-batches; otherwise every call of `step` is an optimizer step."""
    dataloader_drop_last: bool = False
    """Whether the data loader drops a last batch that is not full."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        return dataclasses.asdict(self)


def resolve(keys: BatchKeys, given: Given, ranks: int) -> Batch:
    """Batch sizes on `ranks` that take different samples. Raises ConfigError where those given do not fit together."""
    name = "gradient_accumulation_steps"
    steps = agree(name, given.shortcuts.gradient_accumulation_steps, name, keys.gradient_accumulation_steps)
    batch, micro, steps = _solve(keys.train_batch_size, keys.train_micro_batch_size_per_gpu, steps, ranks)
    return Batch(
        train_batch_size=batch,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=steps,
        managed_gradient_accumulation=keys.managed_gradient_accumulation,
        dataloader_drop_last=keys.dataloader_drop_last,
    )


def _solve(
    batch: int | None, micro: int | None, steps: int | None, world_size: int
) -> tuple[int | None, int | None, int]:
    """Solve train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * world_size."""
    if batch is None:
        steps = steps or 1
        return (None if micro is None else micro * steps * world_size), micro, steps
    if micro is not None and steps is None:
        steps, rest = divmod(batch, micro * world_size)
        unknown = "gradient_accumulation_steps"
    else:
        steps = steps or 1
        derived, rest = divmod(batch, steps * world_size)
        unknown = "train_micro_batch_size_per_gpu"
        if micro is not None and (rest or derived != micro):
            raise ConfigError(
                f"train_batch_size = {batch} is not train_micro_batch_size_per_gpu {micro} * "
                f"gradient_accumulation_steps {steps} * world size {world_size} = {micro * steps * world_size}",
                path="train_batch_size",
                expected=str(micro * steps * world_size),
                got=str(batch),
            )
        micro = derived
    if rest:
        divisor = (micro or 1) * world_size if unknown == "gradient_accumulation_steps" else steps * world_size
        raise ConfigError(
            f"train_batch_size = {batch} leaves no whole {unknown}: it is not a multiple of {divisor} "
            f"(the other factor times world size {world_size})",
            path="train_batch_size",
            expected=f"a multiple of {divisor}",
            got=str(batch),
        )
    return batch, micro, steps
