"""What an engine does and when, as a file in the Trace Event Format that Perfetto and chrome://tracing open.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU is the format's description. A thread's
complete events ("X") nest; transfers of the disk, which overlap, lie on as many rows as are under way at once. Counters
("C") have the core's buckets and the resident memory at the end of each of the engine's calls. All times are of one
clock, in microseconds since the trace began.
"""

from __future__ import annotations

import heapq
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from zeroxide import _core
from zeroxide.engine.parts import Parts
from zeroxide.errors import ConfigError, ModelError, StorageError, ZeroxideError

__all__ = ["EVENTS", "Trace", "record"]

EVENTS = 1 << 16
"""Events of the core that a trace keeps unless it is told: 3 MiB of them."""

_MOST_EVENTS = 1 << 24
_EVENT = struct.Struct("<6Q")
_DISK = {"read": "disk read", "write": "disk write"}


@dataclass(frozen=True)
class _Phase:
    """A call of the engine, in nanoseconds of `time.monotonic_ns()`."""

    name: str
    step: int
    begin: int
    end: int
    thread: int


@dataclass
class Trace:
    """A trace that is being recorded: what it has besides the core's events."""

    begin: int
    """Its first moment, in nanoseconds of `time.monotonic_ns()`."""
    thread: int
    phases: list[_Phase] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)

    def forget_before(self, moment: int) -> None:
        """Makes `moment` (of `time.monotonic_ns()`) the first one of the trace: what began before is not written.

        So a script may record all along and keep the newest steps.
        """
        self.begin = moment
        self.phases = [each for each in self.phases if each.begin >= moment]
        self.memory = [each for each in self.memory if each["ns"] >= moment]


@contextmanager
def record(parts: Parts, path: Path, events: int) -> Iterator[Trace]:
    """Records what happens inside and writes it to `path` in the end; see `Engine.trace`."""
    if not 1 <= events <= _MOST_EVENTS:
        expected = f"1 to {_MOST_EVENTS}"
        raise ConfigError(f"trace: expected {expected} events, got {events}", path="events", expected=expected)
    if parts.timers.listener is not None:
        raise ModelError("trace: this engine records a trace already; end that first")
    if not path.parent.is_dir():
        raise StorageError(f"cannot write the trace to {path}: there is no folder {path.parent}", path=path)
    trace = Trace(time.monotonic_ns(), threading.get_native_id())
    parts.core().recorder().start(events)

    def phase_ended(name: str, start: float, end: float, ahead: int = 1) -> None:
        # Both clocks of Python are the system's monotonic one.
        step = parts.counters.global_steps + ahead
        phase = _Phase(name, step, round(start * 1e9), round(end * 1e9), threading.get_native_id())
        trace.phases.append(phase)
        trace.memory.append(_memory(parts, phase))

    parts.timers.listener = phase_ended
    try:
        yield trace
        if parts.core.alive:
            start = time.perf_counter()
            parts.core().finish()
            phase_ended("finish", start, time.perf_counter(), ahead=0)
    except BaseException:
        # What ended the training is what its script hears of.
        with suppress(ZeroxideError):
            _end(path, parts, trace)
        raise
    _end(path, parts, trace)


def _end(path: Path, parts: Parts, trace: Trace) -> None:
    parts.timers.listener = None
    # An engine that was destroyed inside has nothing more to tell.
    stopped = parts.core().recorder().stop() if parts.core.alive else None
    if stopped is not None:
        _write(path, parts, trace, *stopped)


def _memory(parts: Parts, phase: _Phase) -> dict[str, Any]:
    buckets = {name: current for name, (current, _) in parts.core().usage().items() if name != "total"}
    if parts.activations is not None:
        buckets["activations"] = parts.activations.nbytes
    return {
        "after": phase.name,
        "step": phase.step,
        "ns": phase.end,
        "buckets": buckets,
        "resident": _core.resident()["rss"],
    }


def _write(path: Path, parts: Parts, trace: Trace, packed: bytes, left_out: int) -> None:
    """Writes the file aside and renames it, so that there is never half a trace. Raises StorageError."""
    aside = path.with_name(path.name + ".writing")
    try:
        with aside.open("w", encoding="utf-8") as file:
            _write_events(file, parts, trace, packed, left_out)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise StorageError(
            f"cannot write the trace to {path}: {error.strerror}", path=path, errno=error.errno
        ) from None


def _write_events(file: TextIO, parts: Parts, trace: Trace, packed: bytes, left_out: int) -> None:
    """One event a line, so that a file of many is made and read in pieces."""
    # Older events leave the ring before newer ones do: one that ended before the trace begins shows that all are there.
    if any(end < trace.begin for _, _, end, *_ in _EVENT.iter_unpack(packed)):
        left_out = 0
    about = {
        "zeroxide": _core.__version__,
        "rank": parts.job.world.rank,
        "ranks": parts.job.world.world,
        "limit": parts.config.zeroxide.host_memory,
        "left_out": left_out,
        "units": [unit.name for unit in parts.plan.units],
        "memory": [{**each, "ts": _microseconds(each["ns"] - trace.begin)} for each in trace.memory],
    }
    file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n')
    rows = _Rows(trace.thread)
    pid = parts.job.world.rank
    for event in _events(parts, trace, packed, rows):
        file.write(json.dumps({"pid": pid, **event}) + ",\n")
    name = {"name": f"zeroxide, rank {pid} (process {os.getpid()})"}
    names = [{"ph": "M", "name": "process_name", "pid": pid, "args": name}]
    for place, (tid, row) in enumerate(sorted(rows.names.items())):
        names.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": row}})
        names.append({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": place}})
    file.write(",\n".join(json.dumps(each) for each in names) + "\n]}\n")


class _Rows:
    """The numbers of a trace's rows: the thread that trains, other threads, and the disk's transfers."""

    def __init__(self, first: int) -> None:
        self._threads = {first: 0}
        self.names = {0: "training"}
        self._ends: dict[str, list[tuple[int, int]]] = {}
        """For each kind of transfer, a heap of (end, number) of its rows."""

    def of_thread(self, thread: int) -> int:
        """The row of a thread of the process."""
        if thread not in self._threads:
            number = self._threads[thread] = len(self._threads)
            self.names[number] = f"thread {thread}"
        return self._threads[thread]

    def of_transfer(self, kind: str, begin: int, end: int) -> int:
        """A row on which no transfer of this kind is under way at `begin`; asked in the order in which they begin."""
        rows = self._ends.setdefault(kind, [])
        if rows and rows[0][0] <= begin:
            _, number = heapq.heappop(rows)
        else:
            number = 1000 * (1 + list(_DISK).index(kind)) + len(rows)
            self.names[number] = f"{_DISK[kind]} {len(rows) + 1}"
        heapq.heappush(rows, (end, number))
        return number


def _events(parts: Parts, trace: Trace, packed: bytes, rows: _Rows) -> Iterator[dict[str, Any]]:
    for phase in sorted(trace.phases, key=lambda each: (each.begin, -each.end)):
        yield {
            "ph": "X",
            "cat": "engine",
            "name": phase.name,
            "tid": rows.of_thread(phase.thread),
            "ts": _microseconds(phase.begin - trace.begin),
            "dur": _microseconds(phase.end - phase.begin),
            "args": {"step": phase.step},
        }
    for each in trace.memory:
        at = {"ph": "C", "cat": "memory", "tid": 0, "ts": _microseconds(each["ns"] - trace.begin)}
        yield {**at, "name": "payload", "args": each["buckets"]}
        yield {**at, "name": "resident", "args": {"resident": each["resident"]}}
    for activity, begin, end, count, unit, thread in _EVENT.iter_unpack(packed):
        if begin < trace.begin:
            continue
        name = _core.ACTIVITIES[activity]
        args: dict[str, Any] = {"bytes": count} if count else {}
        if unit:
            args["unit"] = parts.plan.units[unit - 1].name
        yield {
            "ph": "X",
            "cat": "disk" if name in _DISK else "core",
            "name": name,
            "tid": rows.of_transfer(name, begin, end) if name in _DISK else rows.of_thread(thread),
            "ts": _microseconds(begin - trace.begin),
            "dur": _microseconds(end - begin),
            "args": args,
        }


def _microseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1000, 3)
