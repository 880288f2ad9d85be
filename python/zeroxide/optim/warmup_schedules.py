"""Schedules that warm up, with DeepSpeed's names, parameters and values, as ordinary torch schedulers.

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

Iteration -1 has the rate `low`, or 0 with the cosine. A schedule made with `last_batch_iteration` N begins at the rate
of iteration N (DeepSpeed leaves the optimizer's own rate for one step instead).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from zeroxide.optim.schedule import Schedule, integer, per_group

__all__ = ["WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]


def _ratio(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return value


class _Warmup(Schedule):
    """What the three schedules share: the warm-up."""

    def __init__(
        self, optimizer: Optimizer, warmup_num_steps: int, warmup_type: str, last_batch_iteration: int
    ) -> None:
        if warmup_type not in ("log", "linear"):
            raise ValueError(f"warmup_type: expected 'log' or 'linear', got {warmup_type!r}")
        self.warmup_num_steps = max(2, integer("warmup_num_steps", warmup_num_steps, 1))
        self.warmup_type = warmup_type
        super().__init__(optimizer, last_batch_iteration)

    def _warmup_factor(self, iteration: int) -> float:
        if self.warmup_type == "log":
            return math.log(iteration + 1) / math.log(self.warmup_num_steps)
        return iteration / self.warmup_num_steps


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
        self.min_lrs = per_group("warmup_min_lr", warmup_min_lr, len(groups))
        self.max_lrs = own if warmup_max_lr is None else per_group("warmup_max_lr", warmup_max_lr, len(groups))
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

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
        self.total_num_steps = integer("total_num_steps", total_num_steps, 1)
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
        self.total_num_steps = integer("total_num_steps", total_num_steps, 1)
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
