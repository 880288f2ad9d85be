"""What schedules with DeepSpeed's names share: how iterations count, and what is saved.

Optimizer step `k` (from 0) runs with the rate of iteration `k - 1`, as in DeepSpeed; in torch's terms the iteration is
`last_epoch - 1`. Every rate is a closed function of the iteration and of the constructor's arguments, so a schedule
cannot drift, and its saved state is its position alone: the arguments of a resumed run are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Schedule", "integer", "per_group"]


def integer(name: str, value: object, least: int) -> int:
    """`value`. Raises ValueError where it is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return value


def per_group(name: str, value: float | Sequence[float], groups: int) -> list[float]:
    """One number for each of `groups` parameter groups. Raises ValueError where there are others than so many."""
    found = [float(each) for each in value] if isinstance(value, Sequence) else [float(value)] * groups
    if len(found) != groups:
        raise ValueError(f"{name}: expected one rate for each of {groups} parameter groups, got {len(found)}")
    return found


class Schedule(LRScheduler):
    """A position, and how it becomes rates: `_rates` says which. A class sets what those need before it calls this."""

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int) -> None:
        if last_batch_iteration != -1:
            # torch takes the base rates of a schedule that begins further on from here, and raises without.
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        # torch steps once here: from -1 a fresh schedule starts at epoch 0, which is iteration -1.
        super().__init__(optimizer, integer("last_batch_iteration", last_batch_iteration, -1))

    @property
    def last_batch_iteration(self) -> int:
        """The iteration whose rates are in force, as DeepSpeed counts: -1 until the first `step()`."""
        return self.last_epoch - 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which is all that a schedule remembers."""
        return {"last_epoch": self.last_epoch, "last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position (ours or DeepSpeed's) and put its rates into the optimizer."""
        self.last_epoch = integer("last_batch_iteration", state_dict["last_batch_iteration"], -1) + 1
        self._step_count = self.last_epoch + 1
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates

    def get_lr(self) -> list[Any]:
        """Return one rate per parameter group for the current iteration."""
        return self._rates(self.last_batch_iteration)

    def _get_closed_form_lr(self) -> list[Any]:
        return self.get_lr()

    def _rates(self, iteration: int) -> list[Any]:
        raise NotImplementedError
