"""Whether the device that computes still does.

A card that is lost, and a driver whose context a failed kernel has broken, answer every later call with an error. So
what has failed is known by asking once more; from then on nobody asks the device again, and everybody who needs it is
told the same in one line.
"""

from __future__ import annotations

import os
from types import TracebackType

import torch

from zeroxide.device.placement import why_lost
from zeroxide.errors import DeviceError

__all__ = ["DeviceHealth"]


class DeviceHealth:
    """Of one device; the host is never lost."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = os.getpid()
        self._told: tuple[str, str, str] | None = None
        """The line, what was done when it was lost, and what torch or the driver said."""
        self._under_way: list[_Doing] = []
        """The outermost first. A second thread's may be among them."""

    @property
    def lost(self) -> bool:
        """Whether it is known to compute no more."""
        return self._told is not None

    def check(self) -> None:
        """Raises DeviceError once the device is lost."""
        if self._told is not None:
            raise self._error(*self._told)

    def doing(self, what: str) -> _Doing:
        """A context in which something is asked of the device: "weights went up". Raises DeviceError, which says so and
        what was going on around it, where the device is lost before or meanwhile."""
        self.check()
        return _Doing(self, self._under_way, what)

    def noticing(self, what: str) -> _Doing:
        """As `doing`, for what may not need the device."""
        return _Doing(self, self._under_way, what)

    def examine(self, error: Exception, what: str = "work was given to it") -> None:
        """Raises DeviceError in the place of an error that came because the device is lost.

        what: what was done, where nothing is under way that says so.
        """
        if self._told is None:
            # A forked child has no device, and is told so by whoever it asks.
            reason = why_lost(self.device) if os.getpid() == self._process else None
            if reason is None:
                return
            what = " and ".join(each.what for each in self._under_way) or what
            line = (
                f"{self.device} was lost while {what}: {reason}; this process cannot use it any more: start a new one "
                "from the last checkpoint"
            )
            self._told = line, what, reason
        if not isinstance(error, DeviceError) or str(error) != self._told[0]:
            raise self._error(*self._told) from error

    def _error(self, line: str, what: str, reason: str) -> DeviceError:
        error = DeviceError(line, device=self.device.index, what=what)
        error.reason = reason
        return error


class _Doing:
    """See `DeviceHealth.doing`. Entered for every copy: a generator would cost more than the look."""

    __slots__ = ("_health", "_under_way", "what")

    def __init__(self, health: DeviceHealth, under_way: list[_Doing], what: str) -> None:
        self._health, self._under_way, self.what = health, under_way, what

    def __enter__(self) -> None:
        self._under_way.append(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if isinstance(error, Exception):
                self._health.examine(error)
        finally:
            self._under_way.remove(self)
