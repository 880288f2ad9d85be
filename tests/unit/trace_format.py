"""What the Trace Event Format asks of a file, in JSON Object Format: the rules of its description, one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}


def is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def faults_of(event: dict[str, Any]) -> list[str]:
    """What is wrong with one event by itself."""
    found = []
    if not isinstance(event.get("name"), str) or not event["name"]:
        found.append("name")
    for key in ("pid", "tid"):
        if not isinstance(event.get(key), int) and not (key == "tid" and event.get("name") == "process_name"):
            found.append(key)
    if not isinstance(event.get("args", {}), dict):
        found.append("args")
    if event.get("ph") == "X":
        found += [key for key in ("ts", "dur") if not is_time(event.get(key))]
        found += [] if isinstance(event.get("cat"), str) else ["cat"]
    elif event.get("ph") == "C":
        found += [] if is_time(event.get("ts")) else ["ts"]
        numbers = event.get("args", {}).values()
        found += [] if numbers and all(is_time(value) for value in numbers) else ["args of a counter"]
    elif event.get("ph") == "M":
        wanted = METADATA.get(event.get("name", ""))
        found += [] if wanted in event.get("args", {}) else ["metadata"]
    else:
        found.append("ph")
    return found


def crossings(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Complete events of one thread of which neither is inside of the other though they overlap.

    Times are in nanoseconds here: the sum of two rounded decimals is not what a sum rounds to.
    """
    found = []
    by_row: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            by_row.setdefault((event["pid"], event["tid"]), []).append(event)
    for row in by_row.values():
        under_way: list[tuple[int, dict[str, Any]]] = []
        for event in sorted(row, key=lambda each: (each["ts"], -each["dur"])):
            begin = round(event["ts"] * 1000)
            end = begin + round(event["dur"] * 1000)
            while under_way and under_way[-1][0] <= begin:
                under_way.pop()
            if under_way and under_way[-1][0] < end:
                found.append((under_way[-1][1], event))
            under_way.append((end, event))
    return found


def check(path: Path) -> dict[str, Any]:
    """The trace in `path`, which must be one."""
    trace = json.loads(path.read_text())
    assert isinstance(trace["traceEvents"], list)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    wrong = [(faults, event) for event in trace["traceEvents"] if (faults := faults_of(event))]
    assert wrong == []
    assert crossings(trace["traceEvents"]) == []
    named = {event["tid"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {event["tid"] for event in trace["traceEvents"] if event["ph"] == "X"} <= named
    return trace
