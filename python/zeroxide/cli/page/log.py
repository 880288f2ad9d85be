"""The log of a run: steps, held-out losses, and how it began and ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RunLog", "read_log"]


@dataclass
class RunLog:
    """What a run has logged. A step that was repeated after a resume counts with its last values."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By the number of the step, ascending."""
    held_out: dict[int, dict[str, Any]] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    """One for each process that worked on the run."""
    checkpoints: list[int] = field(default_factory=list)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The last event of each kind since the last start, in the order in which they came."""

    @property
    def start(self) -> dict[str, Any]:
        """The last start; empty where there is none."""
        return self.starts[-1] if self.starts else {}

    @property
    def ending(self) -> str | None:
        """How the last process ended, as the kind of its last event; None where the log does not tell."""
        kinds = [kind for kind in self.last if kind in ("end", "stopped", "error", "interrupted")]
        return kinds[-1] if kinds else None

    @property
    def facts(self) -> dict[str, Any]:
        """What the last start knew of the run."""
        facts: dict[str, Any] = self.start.get("facts", {})
        return facts

    @property
    def limit(self) -> int | None:
        """The budget for resident memory, in bytes."""
        limits = [each.get("limit") for each in (self.facts, *reversed(self.steps.values()))]
        return next((int(limit) for limit in limits if limit), None)

    @property
    def peak(self) -> int | None:
        """The most that was resident, in bytes."""
        reached = self.reached.get("process")
        last = max(self.steps, default=None)
        if reached is None and last is not None:
            reached = self.steps[last].get("peak_rss")
        return None if reached is None else int(reached)

    @property
    def reached(self) -> dict[str, int]:
        """Peaks by bucket, where the run came to an end that could tell."""
        for kind in ("end", "stopped"):
            if kind in self.last:
                reached: dict[str, int] = self.last[kind].get("reached", {})
                return reached
        return {}

    @property
    def expected(self) -> dict[str, int]:
        """What the plan expected of each bucket, and of the process once a backward has been seen."""
        expected = {**self.facts.get("expected", {}), **self.last.get("end", {}).get("expected", {})}
        if "process" not in expected and "expected" in self.last:
            expected["process"] = self.last["expected"]["process"]
        return expected

    def column(self, name: str) -> list[tuple[int, float | None]]:
        """(step, value) of every step; None for what is no finite number."""
        return [(step, finite(event.get(name))) for step, event in self.steps.items()]


def finite(value: Any) -> float | None:
    """The number, or None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_log(path: Path) -> RunLog:
    """Reads a JSONL log. A line that is no event, as a killed process leaves one, is passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return _collect(file)


def _collect(lines: Iterable[str]) -> RunLog:
    log = RunLog()
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            continue
        kind, step = event["event"], event.get("step")
        if kind == "start":
            log.starts.append(event)
            # Of what came before, only the steps and what they left stay.
            log.last = {kept: log.last[kept] for kept in ("trace", "sample") if kept in log.last}
        log.last.pop(kind, None)
        log.last[kind] = event
        if isinstance(step, int):
            if kind == "step":
                log.steps[step] = event
            elif kind == "eval":
                log.held_out[step] = event
            elif kind == "checkpoint":
                log.checkpoints.append(step)
    log.steps = dict(sorted(log.steps.items()))
    log.held_out = dict(sorted(log.held_out.items()))
    return log
