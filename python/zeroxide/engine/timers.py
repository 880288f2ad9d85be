"""Where the time of training goes: forward, backward and step since the start, and their parts by DeepSpeed's names.

With `wall_clock_breakdown` every `step` prints a line with the times of its micro-batch, and one that ends an optimizer
step another line with the sums over its micro-batches. Times are wall time on the thread that trains. Parts in a sum:

    fwd, bwd = bwd_inner + bwd_allreduce, step = optimizer_gradients + optimizer_step

`bwd_allreduce` is what backward stood still for in the exchange of gradients, wherever in backward that was; what runs
beside compute takes no time in it. `optimizer_gradients` is for all ranks to agree on the norm, `optimizer_step` for
the update, as far as it runs within `step`: with state on disk the rest is in the next forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from zeroxide.device.placement import is_host, wait_for
from zeroxide.engine.report import print_times

__all__ = ["Timer", "Timers"]

_PARTS = ("fwd", "bwd", "bwd_inner", "bwd_allreduce", "step", "optimizer_gradients", "optimizer_step")
_MICRO = "_microstep"
_SINCE_START = {"fwd": "forward", "bwd": "backward", "step": "step"}


class Timer:
    """Milliseconds between `start` and `stop`, added up until they are reset."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._started: float | None = None
        self._records: list[float] = []

    def start(self) -> None:
        """Begins a measurement. One that is under way is forgotten."""
        self._started = self._now()

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """Ends it; without one, nothing happens. The arguments have no effect, as in DeepSpeed."""
        if self._started is not None:
            self.add(self._now() - self._started)
            self._started = None

    def add(self, seconds: float) -> None:
        """Adds a measurement that was made elsewhere."""
        self._records.append(seconds * 1e3)

    def reset(self) -> None:
        """Forgets all measurements, one that is under way among them."""
        self._records.clear()
        self._started = None

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds in all, those of a measurement under way included, which goes on from here."""
        running = self._started is not None
        self.stop()
        total = sum(self._records)
        if reset:
            self.reset()
        if running:
            self.start()
        return total

    def mean(self) -> float:
        """Mean of the measurements in milliseconds; 0 without any."""
        return self.elapsed(reset=False) / max(1, len(self._records))


class Timers:
    """The timers of one engine, by name. A call that fails is not counted."""

    def __init__(self, device: torch.device, *, breakdown: bool, prints: bool) -> None:
        self.seconds = dict.fromkeys(_SINCE_START.values(), 0.0)
        """Since the start, whatever the config says."""
        self.listener: Callable[[str, float, float], None] | None = None
        """Told the name among `seconds`, start and end of each part as it ends, by `time.perf_counter`."""
        self.breakdown = breakdown
        self.last: dict[str, float] = {}
        """Milliseconds by name at the last `step`: of its micro-batch, and of the optimizer step so far."""
        self.backwards_of_step = 0
        """Backwards since the last optimizer step."""
        self._prints = prints
        self._device = None if is_host(device) or not breakdown else device
        self._timers: dict[str, Timer] = {}
        self._backward = 0.0
        self._reduction = 0.0

    def now(self) -> float:
        """A moment, in seconds; with a breakdown, one at which the device has done all that it was given."""
        if self._device is not None:
            wait_for(self._device)
        return time.perf_counter()

    def __call__(self, name: str) -> Timer:
        """The timer of that name, made where there is none."""
        if name not in self._timers:
            self._timers[name] = Timer(self.now)
        return self._timers[name]

    def get_timers(self) -> dict[str, Timer]:
        """All timers, by name."""
        return self._timers

    def add(self, name: str, start: float, end: float | None = None) -> None:
        """Adds the time from `start` to `end` (by default to now), as `now` gave them, to part `name`."""
        end = self.now() if end is None else end
        spent = end - start
        if name in _SINCE_START:
            self.seconds[_SINCE_START[name]] += spent
            if self.listener is not None:
                self.listener(_SINCE_START[name], start, end)
        if self.breakdown:
            self(name).add(spent)
            self(name + _MICRO).add(spent)

    def begin_backward(self) -> None:
        """The outermost backward begins."""
        self._backward, self._reduction = self.now(), 0.0

    def add_reduction(self, seconds: float) -> None:
        """The backward under way stood still for the exchange of gradients."""
        self._reduction += seconds

    def end_backward(self) -> None:
        """It has ended, with all that it exchanges."""
        self.backwards_of_step += 1
        end = self.now()
        self.add("bwd", self._backward, end)
        if self.breakdown:
            self.add("bwd_inner", self._backward, end - self._reduction)
            self.add("bwd_allreduce", end - self._reduction, end)

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Prints one line with the milliseconds of the timers in `names` that there are, each over `normalizer`, on
        rank 0. The last two arguments have no effect."""
        known = [name for name in names if name in self._timers]
        line = "".join(f" | {name}: {self(name).elapsed(reset) / normalizer:.2f}" for name in known)
        if self._prints:
            print_times(line)

    def end_step(self, *, boundary: bool) -> None:
        """A call of `step` has ended, `boundary`: one that ended an optimizer step."""
        if boundary:
            self.backwards_of_step = 0
        if not self.breakdown:
            return
        micro = [name + _MICRO for name in _PARTS]
        for name in (*micro, *_PARTS):
            self(name)
        self.last = {name: self(name).elapsed(reset=False) for name in (*micro, *_PARTS)}
        self.log(micro)
        if boundary:
            self.log(_PARTS)

    def elapsed_of_step(self) -> dict[str, float]:
        """Milliseconds of each part since the last optimizer step; nothing without a breakdown."""
        return {name: self(name).elapsed(reset=False) for name in _PARTS} if self.breakdown else {}
