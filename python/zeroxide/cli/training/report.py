"""What a run says: a banner, one line per step, and the same figures as JSON, one object a line.

On a terminal a bar stays below the lines; elsewhere there are only lines, each complete and flushed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from zeroxide.config.sizes import format_bytes
from zeroxide.errors import StorageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Reporter", "StepFigures"]


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step, measured. Times are wall-clock seconds, disk figures those of this step alone."""

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    tokens: int
    seconds: float
    forward_seconds: float
    backward_seconds: float
    step_seconds: float
    rss: int
    peak_rss: int
    limit: int | None
    read_bytes: int
    write_bytes: int
    io_busy_seconds: float
    io_wait_seconds: float
    applied: bool = True
    """Whether the step changed the weights: not where a gradient was not finite."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the whole step."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def hidden(self) -> float | None:
        """Share of the disk's busy time during which compute did not stand still; None without disk traffic."""
        if self.io_busy_seconds <= 0:
            return None
        return min(1.0, max(0.0, 1.0 - self.io_wait_seconds / self.io_busy_seconds))

    def line(self, steps: int) -> str:
        """Return the figures as one line of text."""
        width = len(str(steps))
        norm = "   -" if self.grad_norm is None else f"{self.grad_norm:6.3f}"
        memory = f"{self.rss / 2**30:.2f}" + (f"/{self.limit / 2**30:.2f}" if self.limit else "") + " GiB"
        parts = [
            f"step {self.step:>{width}}/{steps}",
            f"loss {self.loss:7.4f}",
            f"norm {norm}",
            f"lr {self.lr:.2e}",
            f"{self.tokens_per_second:7.1f} tok/s",
            f"rss {memory}",
        ]
        if self.read_bytes or self.write_bytes:
            per_second = 1e9 * self.seconds if self.seconds > 0 else math.inf
            parts.append(f"disk r {self.read_bytes / per_second:.2f} w {self.write_bytes / per_second:.2f} GB/s")
        if self.hidden is not None:
            parts.append(f"hidden {self.hidden:4.0%}")
        return "  ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object, derived ones included."""
        return {
            **dataclasses.asdict(self),
            "tokens_per_second": self.tokens_per_second,
            "read_gb_per_second": self.read_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0,
            "write_gb_per_second": self.write_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0,
            "io_hidden": self.hidden,
        }


class Reporter:
    """Writes to `stream` (default: standard output) and, once `open_log` was called, to a JSONL file.

    With `as_json` the stream has the log's lines, and no others.
    """

    def __init__(self, stream: TextIO | None = None, *, as_json: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._as_json = as_json
        self._log: TextIO | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def open_log(self, path: Path, *, append: bool) -> None:
        """Send events to `path` from now on. Raises `StorageError`."""
        try:
            self._log = path.open("a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", path=path, errno=error.errno) from None

    def say(self, line: str) -> None:
        """Print one line for people."""
        if self._as_json:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def banner(self, rows: list[tuple[str, str]]) -> None:
        """Print labelled rows; an empty label continues the row above."""
        self.say("zeroxide train")
        for label, text in rows:
            self.say(f"  {label:<9} {text}".rstrip())

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event to the log. Numbers that JSON has no word for are written as null."""
        if self._log is None:
            return
        value = {"event": kind, "time": round(time.time(), 3), **{key: _plain(item) for key, item in fields.items()}}
        line = json.dumps(value, allow_nan=False)
        if self._as_json:
            print(line, file=self._stream, flush=True)
        try:
            self._log.write(f"{line}\n")
            self._log.flush()
        except OSError as error:
            raise StorageError(f"cannot write the log: {error.strerror}", errno=error.errno) from None

    def start(self, step: int, steps: int) -> None:
        """Show a bar for steps [step, steps) where the stream is a terminal."""
        if self._as_json or not self._stream.isatty():
            return
        # Imported only where it shows something: it costs some 6 MiB of resident memory.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._bar.add_task("training", total=steps, completed=step)
        self._bar.start()

    def step(self, figures: StepFigures, steps: int) -> None:
        """Report one step."""
        self.say(figures.line(steps))
        self.event("step", **figures.as_json())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=figures.step)

    def stop(self) -> None:
        """Take the bar away. Lines can still be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def close(self) -> None:
        """Take the bar away and close the log."""
        self.stop()
        if self._log is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take was reported when it was written
                self._log.close()
            self._log = None


def describe_memory(expected: dict[str, int], memory: dict[str, Any]) -> list[str]:
    """Return one line per bucket, and one for the whole process where something was expected of it: what the plan
    expected and the peak that was reached."""
    lines = []
    for bucket, usage in memory.items():
        if not isinstance(usage, dict) or (bucket == "process" and bucket not in expected):
            continue
        if usage.get("peak", 0) or expected.get(bucket, 0):
            want = f"expected {format_bytes(expected[bucket])}, " if bucket in expected else ""
            lines.append(f"{bucket:<10} {want}peak {format_bytes(int(usage.get('peak', 0)))}")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
