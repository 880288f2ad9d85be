"""Takes down what an engine submits: every copy, event, wait and update, with the bytes of a larger model."""

from __future__ import annotations

import time
from typing import Any

import torch
from timeline import llama
from timeline.model import COMPUTE, Action, Event, Host, Wait

UPDATE_BYTES = 26
"""Bytes of host memory that an update touches for a parameter in the format "split": read are both halves of the
weight, two moments and a bf16 gradient, written are all but the gradient."""


class Recorder:
    """Records while it is `on`. scale: bytes of the large model in a byte of the small one."""

    def __init__(self, costs: llama.Costs) -> None:
        self.record: list[Action] = []
        self.times: list[float] = []
        """When each was recorded, by `time.perf_counter`."""
        self.on = False
        self.costs = costs
        self.scale = 1.0
        self.stream = COMPUTE
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []
        self.sizes: dict[int, int] = {}
        """Bytes of the large model's units by the addresses of the small one's windows."""
        self.pending: list[tuple[int, int]] = []
        """(index, parameters of the large model) of units that a step has begun to update."""

    def add(self, action: Action) -> None:
        if self.on:
            self.record.append(action)
            self.times.append(time.perf_counter())

    def event(self, event: torch.Event, stream: str) -> torch.Event:
        # Kept, so that no other event has its address.
        self.kept.append(event)
        self.numbers[id(event)] = len(self.kept)
        self.add(Event(stream, len(self.kept)))
        return event

    def wait(self, stream: str | None, event: torch.Event | None) -> None:
        if event is not None and id(event) in self.numbers:
            self.add(Wait(stream, self.numbers[id(event)]))

    def numel(self, names: list[str]) -> int:
        """Elements of these parameters of the large model."""
        return sum(map(self.costs.numel, names))

    def updated(self, unit: int | None = None) -> None:
        """The unit has been asked for: it and those before it are up to date, or all where it is None."""
        while self.pending and (unit is None or self.pending[0][0] <= unit):
            self.add(Host(nbytes=UPDATE_BYTES * self.pending.pop(0)[1], what="update"))


class RecordedStream:
    """A stream whose events and waits are recorded."""

    def __init__(self, stream: torch.Stream, name: str, recorder: Recorder) -> None:
        self.stream, self.name, self.recorder = stream, name, recorder
        self.before: list[str] = []

    def wait_event(self, event: torch.Event) -> None:
        self.recorder.wait(self.name, event)
        self.stream.wait_event(event)

    def record_event(self) -> torch.Event:
        return self.recorder.event(self.stream.record_event(), self.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:
        return self.stream == (other.stream if isinstance(other, RecordedStream) else other)

    def __hash__(self) -> int:
        return hash(self.stream)

    def __enter__(self) -> None:
        self.before.append(self.recorder.stream)
        self.recorder.stream = self.name
        self.stream.__enter__()

    def __exit__(self, *error: object) -> None:
        self.recorder.stream = self.before.pop()
        self.stream.__exit__(*error)
