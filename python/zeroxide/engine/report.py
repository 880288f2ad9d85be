"""Times of the parts of a step, and the lines of progress."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Timers", "print_progress"]


class Timers:
    """Seconds spent in forward, backward and step since the start; a call that fails is not counted."""

    def __init__(self) -> None:
        self.seconds = {"forward": 0.0, "backward": 0.0, "step": 0.0}
        self.listener: Callable[[str, float, float], None] | None = None
        """Told the name, start and end of each part as it ends."""

    def add(self, name: str, start: float) -> None:
        """Adds the time since `start`, which `time.perf_counter` gave."""
        end = time.perf_counter()
        self.seconds[name] += end - start
        if self.listener is not None:
            self.listener(name, start, end)


def print_progress(step: int, lr: float, norm: float | None, skipped: int, seconds: dict[str, float] | None) -> None:
    """Prints one line about the optimizer step number `step`. `seconds` are those of `Timers`, None for no times."""
    line = f"[zeroxide] step {step} lr {lr:.3e} grad norm {'-' if norm is None else f'{norm:.3f}'}"
    if skipped:
        line += f" skipped {skipped}"
    if seconds is not None:
        line += "".join(f" {name} {spent:.2f} s" for name, spent in seconds.items())
    print(line, flush=True)
