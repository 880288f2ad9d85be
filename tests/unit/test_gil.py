"""The GIL is released around long calls into the core.

With the switch interval at an hour a thread gives the GIL up only where it says so itself. Whatever another Python
thread does between "begin" and "end" of a call was therefore let in by that call. Only the order of events is looked
at, never how long anything took.
"""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch

from zeroxide import _core
from zeroxide.device.placement import spec

ELEMENTS = 8 << 20
ADAM = _core.Adam(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, bias_correction=True)
DISK, HOST = "disk", "host"


def opened(names, weights, state, directory=None, job="gil"):
    """A core with one unit of `ELEMENTS` for each name, and room for one of them."""
    units = [
        _core.UnitSpec(
            name=name, params=[(ELEMENTS, True)], weights=_core.WeightHome(weights), state=_core.StateHome(state),
            optimizer=ADAM, format="fp32",
        )
        for name in names
    ]  # fmt: skip
    settings = _core.Settings(
        limit=None, threads=1, compute="f32", grad="f32", tile_elements=512 << 10,
        staging_bytes=48 << 20 if directory else 0, gathered_bytes=ELEMENTS * 4 if directory else 0,
        engine=_core.IoEngine.AUTO, queue_depth=16, directories=[directory] if directory else [], job=job,
    )  # fmt: skip
    return _core.Offload(settings, units)


@pytest.fixture
def core(tmp_path):
    made = opened(["big"], DISK, DISK, tmp_path)
    yield made
    made.close()


def others_ran_during(call) -> bool:
    """Whether another Python thread got to run between the begin and the end of `call`."""
    events: list[str] = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            events.append("tick")
            time.sleep(0.0002)

    thread = threading.Thread(target=tick)
    thread.start()
    while "tick" not in events:
        time.sleep(0.001)
    before = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        events.append("begin")
        call()
        events.append("end")
    finally:
        sys.setswitchinterval(before)
        stop.set()
        thread.join()
    return "tick" in events[events.index("begin") : events.index("end")]


def test_long_calls_let_other_threads_run(core):
    """A call that keeps the GIL lets nobody run, however often it is tried; a busy machine may need several tries."""
    given = spec(torch.randn(ELEMENTS))
    group = [ADAM]
    calls = {
        "fill_param": lambda: core.fill_param(0, 0, 0, given),
        "fill_commit": lambda: core.fill_commit(0),
        "gather": lambda: core.gather(0),
        "land": lambda: core.accumulate(0, 0, 0, given, True),
        "step": lambda: core.step(group, 1.0),
        "read_param": lambda: core.read_param(0, 0, "exp_avg", 0, spec(torch.empty(ELEMENTS))),
    }
    # The unit stays in memory after the commit: its gather is short and tried in the next test.
    wanted = set(calls) - {"gather"}
    for _ in range(30):
        core.fill_begin(0, "weights")
        wanted -= {name for name, call in calls.items() if others_ran_during(call)}
        core.release(0)
        if not wanted:
            break
    assert wanted == set()


def test_a_gather_from_disk_lets_other_threads_run(tmp_path):
    with_two = opened(["a", "b"], DISK, HOST, tmp_path)
    for unit in (0, 1):
        with_two.fill_begin(unit, "weights")
        with_two.fill_commit(unit)
    # There is room for one unit: gathering the other one reads it.
    seen = False
    for attempt in range(30):
        unit, read = attempt % 2, with_two.io()["read_bytes"]
        seen = others_ran_during(lambda unit=unit: with_two.gather(unit))
        with_two.release(unit)
        assert with_two.io()["read_bytes"] == read + ELEMENTS * 4
        if seen:
            break
    assert seen
    with_two.close()


def test_two_calls_of_two_cores_overlap(tmp_path):
    """Windows of two threads inside the core overlap: each begins before the other ends."""
    cores = []
    for job in "ab":
        made = opened(["big"], HOST, HOST, job=job)
        made.fill_begin(0, "weights")
        made.fill_commit(0)
        made.accumulate(0, 0, 0, spec(torch.ones(ELEMENTS)), True)
        cores.append(made)
    events: list[str] = []
    barrier = threading.Barrier(2)

    def work(name, made):
        barrier.wait()
        events.append(f"begin {name}")
        made.step([ADAM], 1.0)
        events.append(f"end {name}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        threads = [threading.Thread(target=work, args=pair) for pair in zip("ab", cores, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert {event.split()[0] for event in events[:2]} == {"begin"}
    for made in cores:
        made.close()


def test_the_method_sees_a_call_that_keeps_the_gil():
    assert not others_ran_during(lambda: sum(range(3_000_000)))
