"""Learning-rate schedules with DeepSpeed's names, parameters and values, as ordinary torch schedulers."""

from __future__ import annotations

from zeroxide.optim.cyclic_schedules import LRRangeTest, OneCycle
from zeroxide.optim.schedule import Schedule
from zeroxide.optim.warmup_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["SCHEDULES", "LRRangeTest", "OneCycle", "Schedule", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

SCHEDULES: dict[str, type[Schedule]] = {
    each.__name__: each for each in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
"""The class for each name that `scheduler.type` may have."""
