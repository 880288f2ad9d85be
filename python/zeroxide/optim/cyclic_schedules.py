"""Schedules that look for good rates, or cycle through them, with DeepSpeed's names, parameters and values.

Both are of Smith, A disciplined approach to neural network hyper-parameters (arXiv:1803.09820): the range test of
section 3, and the 1cycle policy of section 4.2. With `i` the iteration plus one, which is the optimizer step:

| class | rate |
|---|---|
| `LRRangeTest` | low (1 + step_rate x), x = i / step_size, or its whole part where `staircase` |
| `OneCycle`, i <= first + second | low + (high - low) s |
| `OneCycle`, after that | low / (1 + decay_lr_rate (i - first - second) / decay_step_size) |

s rises from 0 to 1 over the first half of the cycle and falls to 0 over the second, in a straight line or in stairs.
Where the momentum (Adam's first beta) cycles, it is high - (high - low) s, and after the cycle
high (1 + decay_mom_rate (i - first - second) / decay_step_size). As in DeepSpeed the first step has the low momentum,
and the second beta is 0.99 whatever the optimizer was made with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from zeroxide.optim.schedule import Schedule, integer, per_group

__all__ = ["LRRangeTest", "OneCycle"]

logger = logging.getLogger("zeroxide")

_SECOND_BETA = 0.99


class LRRangeTest(Schedule):
    """Rises from `lr_range_test_min_lr` without end, to see where training diverges."""

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = per_group("lr_range_test_min_lr", lr_range_test_min_lr, len(optimizer.param_groups))
        self.step_size = integer("lr_range_test_step_size", lr_range_test_step_size, 1)
        self.step_rate = float(lr_range_test_step_rate)
        self.staircase = bool(lr_range_test_staircase)
        super().__init__(optimizer, last_batch_iteration)

    def _rates(self, iteration: int) -> list[Any]:
        intervals = (iteration + 1) / self.step_size
        if self.staircase:
            intervals = (iteration + 1) // self.step_size
        return [low * (1 + self.step_rate * intervals) for low in self.min_lrs]


class OneCycle(Schedule):
    """Rises from `cycle_min_lr` to `cycle_max_lr` and falls back, once; then the rate decays, if it is to.

    `cycle_momentum`: whether the first beta of each group moves the other way. Without betas it does not, and a line
    says so. Rates and momenta are one number for all parameter groups, or a sequence with one for each.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | Sequence[float] = 0.8,
        cycle_max_mom: float | Sequence[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        groups = len(optimizer.param_groups)
        self.first = float(cycle_first_step_size)
        self.second = self.first if cycle_second_step_size is None else float(cycle_second_step_size)
        if self.first <= 0 or self.second < 0:
            name, least = (
                ("cycle_first_step_size", "above 0") if self.first <= 0 else ("cycle_second_step_size", "at least 0")
            )
            raise ValueError(f"{name}: expected a number {least}, got {self.first if self.first <= 0 else self.second}")
        self.first_stairs = integer("cycle_first_stair_count", cycle_first_stair_count, 0)
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.second_stairs = integer("cycle_second_stair_count", second_stairs, 0)
        self.min_lrs = per_group("cycle_min_lr", cycle_min_lr, groups)
        self.max_lrs = per_group("cycle_max_lr", cycle_max_lr, groups)
        self.decay_step_size = float(decay_step_size)
        self.decay_lr_rate, self.decay_mom_rate = float(decay_lr_rate), float(decay_mom_rate)
        self.min_moms = per_group("cycle_min_mom", cycle_min_mom, groups)
        self.max_moms = per_group("cycle_max_mom", cycle_max_mom, groups)
        self.cycle_momentum = bool(cycle_momentum)
        if self.cycle_momentum and any("betas" not in group for group in optimizer.param_groups):
            logger.warning("OneCycle: %s has no betas: cycle_momentum has no effect", type(optimizer).__name__)
            self.cycle_momentum = False
        if self.cycle_momentum:
            # DeepSpeed's own changes it without a word.
            own = sorted({group["betas"][1] for group in optimizer.param_groups} - {_SECOND_BETA})
            if own:
                line = "OneCycle: the second beta is %s, not %s, as with DeepSpeed; cycle_momentum: false leaves it"
                logger.warning(line, _SECOND_BETA, ", ".join(map(str, own)))
        super().__init__(optimizer, last_batch_iteration)

    def step(self, epoch: int | None = None) -> None:
        """To the next iteration: its rate, and its momentum, go into the optimizer's groups."""
        super().step(epoch)
        self._put_momenta()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to a saved position (ours or DeepSpeed's), and puts its rates and momenta into the optimizer."""
        super().load_state_dict(state_dict)
        self._put_momenta()

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Betas of each group for the current iteration; None where they do not cycle."""
        if not self.cycle_momentum:
            return None
        iteration = self.last_batch_iteration
        if iteration < 0:
            return [(low, _SECOND_BETA) for low in self.min_moms]
        after = iteration + 1 - (self.first + self.second)
        if iteration < self.first + self.second:
            s = self._height(iteration + 1)
            return [
                (high - (high - low) * s, _SECOND_BETA) for low, high in zip(self.min_moms, self.max_moms, strict=True)
            ]
        factor = 1 + self._decay(self.decay_mom_rate, after)
        return [(high * factor, _SECOND_BETA) for high in self.max_moms]

    def _put_momenta(self) -> None:
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or (), strict=False):
            group["betas"] = betas

    def _rates(self, iteration: int) -> list[Any]:
        if iteration < self.first + self.second:
            s = self._height(iteration + 1)
            return [low + (high - low) * s for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        after = iteration + 1 - (self.first + self.second)
        return [low / (1 + self._decay(self.decay_lr_rate, after)) for low in self.min_lrs]

    def _decay(self, rate: float, after: float) -> float:
        return 0.0 if self.decay_step_size == 0 else rate * after / self.decay_step_size

    def _height(self, step: int) -> float:
        """How far up the cycle is, from 0 to 1; its first step is also the one after its last."""
        at = math.fmod(step, self.first + self.second)
        if at <= self.first:
            done, whole, stairs = at, self.first, self.first_stairs
        else:
            done, whole, stairs = self.first + self.second - at, self.second, self.second_stairs
        # Multiplied first: a quotient that is rounded down would lose a stair, and the top with it.
        return done / whole if stairs == 0 else math.floor(done * stairs / whole) / stairs
