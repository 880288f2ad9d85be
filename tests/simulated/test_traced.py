"""A trace of an engine whose model computes on a device: of what the core does, and no number changes by it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from simulated import engines
from simulated.test_on_device import engine_of, train

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from trace_format import check


@pytest.mark.parametrize("place", ["host", "half", "all"])
def test_what_the_core_does_is_traced_wherever_state_is(place, tmp_path):
    """State at home on the device is updated by kernels, and none of that is the core's."""
    found = []
    for traced in (False, True):
        with engines.followed(kernels=True), engine_of(place) as engine:
            losses = train(engine, steps=1)
            if traced:
                with engine.trace(tmp_path / "trace.json"):
                    losses += train(engine, first=1, steps=2)
            else:
                losses += train(engine, first=1, steps=2)
            found.append(losses + train(engine, first=3, steps=1))
    assert found[0] == found[1]
    events = [event for event in check(tmp_path / "trace.json")["traceEvents"] if event["ph"] == "X"]
    names = [event["name"] for event in events]
    assert [names.count(each) for each in ("forward", "backward", "step", "finish")] == [4, 4, 2, 1]
    assert ("update" in names) == (place != "all")
