"""The trace of some steps, as intervals in seconds since it began, and what overlaps with what."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Interval", "Phase", "Timeline", "overlap", "read_timeline", "total", "union"]

Interval = tuple[float, float]


@dataclass(frozen=True)
class Phase:
    """A call of the engine."""

    name: str
    step: int
    begin: float
    end: float


@dataclass
class Timeline:
    """What a trace holds."""

    phases: list[Phase] = field(default_factory=list)
    activities: dict[str, list[Interval]] = field(default_factory=dict)
    """Intervals of each activity, in the order in which they begin."""
    moved: dict[str, int] = field(default_factory=dict)
    """Bytes of each activity."""
    memory: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0

    @property
    def end(self) -> float:
        """When the last of it ended."""
        ends = [phase.end for phase in self.phases]
        ends += [end for each in self.activities.values() for _, end in each]
        return max(ends, default=0.0)

    @property
    def steps(self) -> list[int]:
        """Steps that it has phases of."""
        return sorted({phase.step for phase in self.phases if phase.name != "finish"})


def read_timeline(path: Path) -> Timeline | None:
    """The trace in a file; None where there is none, or none that can be read."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        return _timeline(trace["traceEvents"], trace["otherData"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _timeline(events: list[dict[str, Any]], about: dict[str, Any]) -> Timeline:
    found = Timeline(memory=list(about["memory"]), left_out=int(about["left_out"]))
    for event in events:
        if event["ph"] != "X":
            continue
        begin = event["ts"] / 1e6
        end = begin + event["dur"] / 1e6
        if event["cat"] == "engine":
            found.phases.append(Phase(event["name"], int(event["args"]["step"]), begin, end))
            continue
        found.activities.setdefault(event["name"], []).append((begin, end))
        found.moved[event["name"]] = found.moved.get(event["name"], 0) + int(event["args"].get("bytes", 0))
    for each in found.activities.values():
        each.sort()
    return found


def union(intervals: list[Interval]) -> list[Interval]:
    """The same times, as intervals that do not touch."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def total(intervals: list[Interval]) -> float:
    """Seconds in which at least one is under way."""
    return sum(end - begin for begin, end in union(intervals))


def overlap(one: list[Interval], other: list[Interval]) -> float:
    """Seconds in which at least one of each is under way."""
    left, right = union(one), union(other)
    at, found = 0, 0.0
    for begin, end in left:
        while at < len(right) and right[at][1] <= begin:
            at += 1
        along = at
        while along < len(right) and right[along][0] < end:
            found += min(end, right[along][1]) - max(begin, right[along][0])
            along += 1
    return found
