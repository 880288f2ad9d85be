"""The learning rate of each step as a fraction of `--lr`."""

from __future__ import annotations

import math

from zeroxide.cli.training.options import TrainOptions

__all__ = ["fraction_of_peak"]

_FLOOR = 0.1


def fraction_of_peak(step: int, options: TrainOptions) -> float:
    """Return the factor for `step`, counted from 0: linear warm-up, then the chosen decay to a tenth, or none.

    The first step already trains (a warm-up from exactly zero would waste it), and the last one is near the floor.
    """
    warmup = options.warmup or 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, options.steps - warmup))
    falling = 1.0 - progress if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return _FLOOR + (1.0 - _FLOOR) * falling
