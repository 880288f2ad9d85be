"""A step as a record of what a host submits, and when everything would end at given rates.

Streams do what they are given in order; an event ends when its stream has come to it; the host submits, waits and works
in order, and submitting takes no time. Each stream that copies has the link's whole rate: that two of them in one
direction would share it is left out, in favour of whoever has two. So one pass over the record gives every time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

COMPUTE = "compute"


@dataclass(frozen=True)
class Work:
    """A stream computes for so many FLOP."""

    stream: str
    flop: float = 0.0
    what: str = ""


@dataclass(frozen=True)
class Copy:
    """A stream copies so many bytes over the link."""

    stream: str
    way: Literal["up", "down"]
    nbytes: float
    what: str = ""


@dataclass(frozen=True)
class Event:
    """A stream comes to an event, known by its number."""

    stream: str
    number: int


@dataclass(frozen=True)
class Wait:
    """A stream, or the host where it is None, waits for an event; one that is not in the record has come before it."""

    stream: str | None
    number: int


@dataclass(frozen=True)
class Host:
    """The host touches so many bytes of its memory, or is busy for so many seconds, and submits nothing meanwhile."""

    nbytes: float = 0.0
    seconds: float = 0.0
    what: str = ""


@dataclass(frozen=True)
class Mark:
    """A step ends here for the host."""


Action = Work | Copy | Event | Wait | Host | Mark


@dataclass(frozen=True)
class Rates:
    """FLOP and bytes a second; `latency` is what every copy takes besides, in seconds."""

    flops: float
    link: float
    host_memory: float
    latency: float = 0.0


@dataclass
class Timeline:
    """When everything ended, in seconds."""

    marks: list[float] = field(default_factory=list)
    busy: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of all that the compute stream did."""
    end: float = 0.0

    def exposed(self, begin: float, end: float) -> float:
        """Seconds between the two in which the compute stream did nothing."""
        return end - begin - sum(max(0.0, min(end, till) - max(begin, since)) for since, till in self.busy)


def replay(record: Sequence[Action], rates: Rates) -> Timeline:
    """The times of a record."""
    found = Timeline()
    host = 0.0
    free: dict[str, float] = defaultdict(float)
    events: dict[int, float] = {}
    for act in record:
        match act:
            case Work(stream, flop):
                begin = max(free[stream], host)
                free[stream] = begin + flop / rates.flops
                if stream == COMPUTE:
                    found.busy.append((begin, free[stream]))
            case Copy(stream, _, nbytes):
                free[stream] = max(free[stream], host) + nbytes / rates.link + rates.latency
            case Event(stream, number):
                events[number] = max(free[stream], host)
            case Wait(None, number):
                host = max(host, events.get(number, 0.0))
            case Wait(stream, number):
                free[stream] = max(free[stream], events.get(number, 0.0))
            case Host(nbytes, seconds):
                host += nbytes / rates.host_memory + seconds
            case Mark():
                found.marks.append(host)
        found.end = max(found.end, host, *free.values())
    return found


@dataclass(frozen=True)
class Split:
    """A step's seconds: all of them, those in which the device computes, and why it stands in the rest. It stands for
    the host as long as it would if copies took no time; what it stands beyond that, it stands for copies."""

    step: float
    compute: float
    for_host: float
    for_copies: float

    @property
    def exposed(self) -> float:
        """Seconds in which the device computes nothing."""
        return self.for_host + self.for_copies


def last_step(record: Sequence[Action], rates: Rates) -> Split:
    """The last step of a record that has a mark at the end of each and at least two."""
    full = replay(record, rates)
    free = replay(record, replace(rates, link=math.inf, latency=0.0))
    exposed, for_host = (each.exposed(*each.marks[-2:]) for each in (full, free))
    step = full.marks[-1] - full.marks[-2]
    return Split(step, step - exposed, for_host, exposed - for_host)
