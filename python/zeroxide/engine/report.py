"""The lines of progress."""

from __future__ import annotations

__all__ = ["print_progress", "print_times"]


def print_progress(step: int, lr: float, norm: float | None, skipped: int, redone: int = 0) -> None:
    """Prints one line about the optimizer step number `step`. Until now `skipped` steps were left out, and `redone`
    made twice, since backward had updated and they clipped."""
    line = f"[zeroxide] step {step} lr {lr:.3e} grad norm {'-' if norm is None else f'{norm:.3f}'}"
    if skipped:
        line += f" skipped {skipped}"
    if redone:
        line += f" redone {redone}"
    print(line, flush=True)


def print_times(times: str) -> None:
    """Prints rank 0's times, which `times` has in words, in DeepSpeed's form."""
    print(f"[Rank 0] time (ms){times}", flush=True)
