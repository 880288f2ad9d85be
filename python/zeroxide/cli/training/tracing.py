"""Which steps of a run have a timeline: those that `--trace` names, or the newest two whenever the run ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zeroxide.cli.training.options import TrainOptions
from zeroxide.errors import BudgetError, StorageError

__all__ = ["Tracing"]


class Tracing:
    """Records steps of `engine` into `path` while entered. A trace that cannot be had costs the timeline, not the run.

    `say` is told of that; `done` of the first and last step in the file once it is there.
    """

    def __init__(
        self,
        engine: Any,
        path: Path,
        options: TrainOptions,
        say: Callable[[str], None],
        done: Callable[[int, int], None],
    ) -> None:
        self._engine = engine
        self._path = path
        self._window = options.traced_steps
        self._over = options.trace == "none"
        self._say = say
        self._done = done
        self._recording = contextlib.ExitStack()
        self._trace: Any = None
        self._first = self._last = 0
        """Steps that are in the trace."""
        self._begins: list[tuple[int, int]] = []
        """(step, moment) at which the newest steps began, two at most."""

    def before_step(self, step: int) -> None:
        """Step number `step`, counted from 1, is about to begin."""
        if self._over or (self._window is not None and step < self._window[0]):
            return
        if self._window is not None and step > self._window[1]:
            self._say(
                f"no trace of steps {self._window[0]} to {self._window[1]}: the run goes on after step {step - 1}"
            )
            self._over = True
            return
        if self._trace is None and not self._begin(step):
            return
        self._begins = [*self._begins[-1:], (step, time.monotonic_ns())]
        if self._window is None:
            self._first, moment = self._begins[0]
            self._trace.forget_before(moment)

    def after_step(self, step: int) -> None:
        """Step number `step` has ended."""
        self._last = step
        if self._trace is not None and self._window is not None and step == self._window[1]:
            self._end(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trace is not None:
            self._end(kind, error, trace)

    def _begin(self, step: int) -> bool:
        try:
            self._trace = self._recording.enter_context(self._engine.trace(self._path))
        except (BudgetError, StorageError) as error:
            self._say(f"no trace of this run: {error.message}")
            self._over = True
            return False
        self._first = step
        return True

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._trace, self._over = None, True
        try:
            self._recording.__exit__(kind, error, trace)
        except StorageError as refused:
            # Only of this file: what the disk refuses of the run's state ends the run.
            if refused is error or refused.path != str(self._path):
                raise
            self._say(f"no trace of this run: {refused.message}")
            return
        if self._path.exists() and self._last >= self._first:
            self._done(self._first, self._last)
