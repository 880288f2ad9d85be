"""Ctrl-C and SIGTERM: asked once, a run stops after the step it is in; asked twice, it stops where it is."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopRequest"]


class StopRequest:
    """Catches SIGINT and SIGTERM while entered.

    Until `defer` is called there is no step to finish and no state to keep, so a signal ends the run at once as
    `KeyboardInterrupt`. After it, the first signal is remembered in `number` for the loop to see, and the second one
    raises `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferring = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.number is not None

    @property
    def name(self) -> str:
        """The signal's name, for a message."""
        return "no signal" if self.number is None else signal.Signals(self.number).name

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self.number or signal.SIGINT)

    def defer(self) -> None:
        """From now on let the first signal wait for the end of the step."""
        self._deferring = True

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        again = self.requested
        self.number = number
        if again or not self._deferring:
            raise KeyboardInterrupt
