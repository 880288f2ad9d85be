"""The model beside the simulated device: what the engine submits, and when it is done where copies take known times."""

from __future__ import annotations

import math
from dataclasses import replace

from timeline import engine_order
from timeline.model import Action, Copy, Host, Rates, Work, replay

LAYERS = 2


def check(delay: float, micro_batches: int = 1) -> dict[str, object]:
    """Compares them for one step of a model of two layers, where every copy takes `delay` seconds.

    What the host takes between what it submits is measured in a run whose copies take no time. From that and the delay
    the model says how long the step takes; the simulated device, whose copies sleep so long, says how long it took.
    """
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    free, slow = (
        engine_order.record(zero, 1, layers=LAYERS, micro_batches=micro_batches, delay=each) for each in (0.0, delay)
    )
    expected = replay(paced(free.record, free.times), Rates(math.inf, math.inf, math.inf, latency=delay)).marks[-1]
    took = slow.times[-1] - slow.times[0]
    return {
        "delay": delay,
        "micro_batches": micro_batches,
        "copies": sum(isinstance(each, Copy) for each in free.record),
        "same_order": list(map(type, free.record)) == list(map(type, slow.record)),
        "without": round(free.times[-1] - free.times[0], 4),
        "modelled": round(expected, 4),
        "measured": round(took, 4),
        "ratio": round(expected / took, 4),
    }


def paced(record: list[Action], times: list[float]) -> list[Action]:
    """The record with the time between what was submitted in place of what the model has for the host and for work."""
    found: list[Action] = []
    for act, before, at in zip(record, [times[0], *times], times, strict=False):
        found.append(Host(seconds=at - before))
        if isinstance(act, Work):
            found.append(replace(act, flop=0.0))
        elif not isinstance(act, Host):
            found.append(act)
    return found
