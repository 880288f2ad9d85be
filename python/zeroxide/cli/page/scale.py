"""Where a number lies on an axis, and how numbers are written on the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zeroxide.config.sizes import format_bytes

__all__ = ["NOTHING", "Scale", "byte_ticks", "number", "seconds", "size", "ticks"]

NOTHING = "—"
"""Where there is no number."""


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` on pixels from `start` to `end`. `low` is less than `high`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a number."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, count)
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [factor * power for factor in (1, 2, 5, 10)]
    at = next(number for number, step in enumerate(steps) if step >= rough * 0.999)
    # Between two multiples of a step there may be none of it: a smaller one has some.
    for step in (*reversed(steps[: at + 1]), 0.5 * power, 0.2 * power):
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        if first <= last:
            return [each * step for each in range(first, last + 1)]
    return [low]


def byte_ticks(high: float, count: int) -> list[float]:
    """About `count` sizes from 0 to `high` bytes: powers of two, or multiples of one."""
    step = 2.0 ** math.ceil(math.log2(max(1.0, high / max(1, count))))
    return [each * step for each in range(math.floor(high / step) + 1)]


def number(value: float | None) -> str:
    """A number with four digits that count; a dash where there is none."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def size(count: float | None) -> str:
    """Bytes in words; a dash where there are none to tell of."""
    return NOTHING if count is None else format_bytes(int(count))


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(value) * factor >= 1:
            return f"{value * factor:.4g} {unit}"
    return f"{value * 1e6:.2g} µs"
