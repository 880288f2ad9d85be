"""The exchange of gradients with a clock beside it."""

from __future__ import annotations

import time
from collections.abc import Callable

from zeroxide.zero.reduce.gradient_reduction import GradientReduction
from zeroxide.zero.reduce.sent import SentGradients
from zeroxide.zero.unit import Unit

__all__ = ["TimedReduction"]


class TimedReduction:
    """`reduction`, which tells `note` how many seconds its caller stood still in it."""

    def __init__(self, reduction: GradientReduction, note: Callable[[float], None]) -> None:
        self._reduction = reduction
        self._note = note

    @property
    def sent(self) -> SentGradients:
        """See `GradientReduction.sent`."""
        return self._reduction.sent

    def send(self, unit: Unit) -> None:
        """See `GradientReduction.send`."""
        start = time.perf_counter()
        self._reduction.send(unit)
        self._note(time.perf_counter() - start)

    def reduce(self, unit: Unit) -> None:
        """See `GradientReduction.reduce`."""
        start = time.perf_counter()
        self._reduction.reduce(unit)
        self._note(time.perf_counter() - start)

    def end_backward(self) -> None:
        """See `GradientReduction.end_backward`."""
        start = time.perf_counter()
        self._reduction.end_backward()
        self._note(time.perf_counter() - start)

    def abandon(self) -> None:
        """See `GradientReduction.abandon`."""
        self._reduction.abandon()
