"""Learning-rate schedules with DeepSpeed's names, parameters and values, as ordinary torch schedulers.

All three warm up over `n = max(2, warmup_num_steps)` iterations and differ in what follows. At iteration `i` the
warm-up factor is

    log:     ln(i + 1) / ln(n)
    linear:  i / n

and after it (`i >= n`), with `T = total_num_steps` and `c = cos_min_ratio`:

| class | factor | rate |
|---|---|---|
| `WarmupLR` | 1 | low + (high - low) factor |
| `WarmupDecayLR` | max(0, (T - i) / max(1, T - n)) | low + (high - low) factor |
| `WarmupCosineLR` | c + (1 - c) (1 + cos(pi min(1, (i - n + 1) / max(1, T - n)))) / 2 | base factor |

`low` and `high` are `warmup_min_lr` and `warmup_max_lr`, `base` is the optimizer's own rate, and the warm-up of
`WarmupCosineLR` runs from `warmup_min_ratio` to 1.

Iterations count as in DeepSpeed: optimizer step `k` (from 0) runs with the rate of iteration `k - 1`, where iteration
-1 has the rate `low`, or 0 with the cosine. In torch's terms the iteration is `last_epoch - 1`. A schedule made with
`last_batch_iteration` N begins at the rate of iteration N (DeepSpeed leaves the optimizer's own rate for one step
instead). Every rate is a closed
function of the iteration and of the constructor's arguments, so a schedule cannot drift, and its saved state is its
position alone: the arguments of a resumed run are its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["SCHEDULES", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return value


def _ratio(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return value


class _Warmup(LRScheduler):
    """What the three schedules share: the warm-up, the position, and how the two become rates."""

    def __init__(
        self, optimizer: Optimizer, warmup_num_steps: int, warmup_type: str, last_batch_iteration: int
    ) -> None:
        if warmup_type not in ("log", "linear"):
            raise ValueError(f"warmup_type: expected 'log' or 'linear', got {warmup_type!r}")
        self.warmup_num_steps = max(2, _integer("warmup_num_steps", warmup_num_steps, 1))
        self.warmup_type = warmup_type
        if last_batch_iteration != -1:
            # torch takes the base rates of a schedule that begins further on from here, and raises without.
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        # torch steps once here: from -1 a fresh schedule starts at epoch 0, which is iteration -1.
        super().__init__(optimizer, _integer("last_batch_iteration", last_batch_iteration, -1))

    @property
    def last_batch_iteration(self) -> int:
        """The iteration whose rates are in force, as DeepSpeed counts: -1 until the first `step()`."""
        return self.last_epoch - 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which is all that a schedule remembers."""
        return {"last_epoch": self.last_epoch, "last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position (ours or DeepSpeed's) and put its rates into the optimizer."""
        self.last_epoch = _integer("last_batch_iteration", state_dict["last_batch_iteration"], -1) + 1
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

    def _warmup_factor(self, iteration: int) -> float:
        if self.warmup_type == "log":
            return math.log(iteration + 1) / math.log(self.warmup_num_steps)
        return iteration / self.warmup_num_steps

    def _rates(self, iteration: int) -> list[Any]:
        raise NotImplementedError


def _warn_if_never_reached(total_num_steps: int, warmup_num_steps: int) -> None:
    if total_num_steps < warmup_num_steps:
        warnings.warn(
            f"total_num_steps {total_num_steps} is below warmup_num_steps {warmup_num_steps}: "
            "the schedule ends inside its warm-up",
            stacklevel=3,
        )


class WarmupLR(_Warmup):
    """Rise from `warmup_min_lr` to `warmup_max_lr`, then stay.

    Both rates are one number for all parameter groups, or a sequence with one for each. Without `warmup_max_lr` every
    group rises to the rate that its optimizer was made with.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        groups = optimizer.param_groups
        own = [float(group.get("initial_lr", group["lr"])) for group in groups]
        self.min_lrs = self._per_group("warmup_min_lr", warmup_min_lr, len(groups))
        self.max_lrs = own if warmup_max_lr is None else self._per_group("warmup_max_lr", warmup_max_lr, len(groups))
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    @staticmethod
    def _per_group(name: str, value: float | Sequence[float], groups: int) -> list[float]:
        rates = [float(each) for each in value] if isinstance(value, Sequence) else [float(value)] * groups
        if len(rates) != groups:
            raise ValueError(f"{name}: expected one rate for each of {groups} parameter groups, got {len(rates)}")
        return rates

    def _factor_after_warmup(self, iteration: int) -> float:
        return 1.0

    def _rates(self, iteration: int) -> list[Any]:
        if iteration < 0:
            factor = 0.0
        elif iteration < self.warmup_num_steps:
            factor = self._warmup_factor(iteration)
        else:
            factor = self._factor_after_warmup(iteration)
        return [low + (high - low) * factor for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """Rise from `warmup_min_lr` to `warmup_max_lr`, then fall back in a straight line until `total_num_steps`.

    The default of `warmup_max_lr` is DeepSpeed's for this schedule, 0.001, whatever the optimizer's rate is.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _integer("total_num_steps", total_num_steps, 1)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_if_never_reached(self.total_num_steps, self.warmup_num_steps)

    def _factor_after_warmup(self, iteration: int) -> float:
        return max(0.0, (self.total_num_steps - iteration) / max(1, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Rise from `warmup_min_ratio` of each group's own rate to all of it, then fall to `cos_min_ratio` of it."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _integer("total_num_steps", total_num_steps, 1)
        self.warmup_min_ratio = _ratio("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = _ratio("cos_min_ratio", cos_min_ratio)
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_if_never_reached(self.total_num_steps, self.warmup_num_steps)

    def _factor(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._warmup_factor(iteration)
        falling = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (iteration - self.warmup_num_steps + 1) / falling)
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2

    def _rates(self, iteration: int) -> list[Any]:
        factor = self._factor(iteration)
        return [base * factor for base in self.base_lrs]


SCHEDULES: dict[str, type[WarmupLR] | type[WarmupCosineLR]] = {
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
}
"""The class for each name that `scheduler.type` may have."""
