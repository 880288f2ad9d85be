"""The most memory that this process has held since a moment of one's own.

The kernel keeps one peak, since the process began, and what came before an engine is not the engine's. So the peak is
reset where the system allows it. That shows outside: `VmHWM` and `ru_maxrss` of the process begin anew for everybody.
"""

from __future__ import annotations

import weakref

from zeroxide import _core
from zeroxide.errors import BudgetError

__all__ = ["Peak", "check_budget", "room_in_budget"]

FRAGMENTS = 1.025
"""What the C allocator makes of what is asked of it, as the planner expects."""

_live: weakref.WeakSet[Peak] = weakref.WeakSet()


class Peak:
    """Counts from where it is made; in bytes of resident memory.

    Where the system does not let the kernel's peak be reset, a peak below that of before is known only from samples,
    which every call of a method takes.
    """

    def __init__(self) -> None:
        self._most = 0
        """Of what ended with the last `start_over`."""
        self._seen = 0
        self._before = 0
        """The kernel's peak while it says nothing of the time since the start; 0 where it was reset."""
        self.start_over()
        self._most = 0
        self.at_start = self._seen
        """What was resident at the beginning."""
        _live.add(self)

    @property
    def exact(self) -> bool:
        """Whether the peak is the kernel's count, and not the most of what was seen."""
        return _core.resident()["peak"] > self._before

    def since_start_over(self) -> int:
        """The peak since `start_over` was called last."""
        found = _core.resident()
        counted = found["peak"] > self._before
        self._seen = max(self._seen, found["peak"] if counted else found["rss"])
        return self._seen

    def most(self) -> int:
        """The peak since the beginning."""
        return max(self._most, self.since_start_over())

    def start_over(self) -> None:
        """Begins to count from what is resident now."""
        self._most = self.most()
        # A reset takes from the others what the kernel has counted for them.
        for each in _live:
            each.since_start_over()
        if _core.reset_peak():
            for each in (self, *_live):
                each._before = 0
        else:
            self._before = _core.resident()["peak"]
        self._seen = _core.resident()["rss"]


def room_in_budget(limit: int | None, expected: int, beside: int) -> int | None:
    """Bytes that may still be taken of a budget of `limit`, of which `expected` are planned and `beside` taken besides:
    what is resident at present counts where it is more. None without a budget."""
    if limit is None:
        return None
    return max(0, int(limit / FRAGMENTS) - max(expected + beside, _core.resident()["rss"]))


def check_budget(peak: Peak, limit: int | None, step: int) -> None:
    """Raises BudgetError when more than `limit` bytes were resident since the last check that failed."""
    if limit is None:
        return
    most = peak.since_start_over()
    if most > limit:
        # The next step is measured by itself, so that a smaller batch helps.
        peak.start_over()
        raise BudgetError(
            f"resident memory reached {most / 2**20:.0f} MiB, the budget is {limit / 2**20:.0f} MiB: after step "
            f"{step} everything is intact; raise host_memory, or lower the batch or sequence length",
            need=most,
            limit=limit,
        )
