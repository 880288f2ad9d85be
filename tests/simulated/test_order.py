"""Streams, events and copies: what is ordered by a wait is seen, and what is not is named."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

LATE = 100_000
"""Microseconds, long enough for the host to be first."""


def found(sim):
    return {(each.first, each.second) for each in sim.races()}


def copy_up(host, stream, event=None):
    with stream:
        there = torch.empty(host.shape, dtype=host.dtype, device="sim")
        there.copy_(host, non_blocking=True)
        if event is not None:
            event.record()
    return there


def test_a_copy_up_that_is_waited_for(sim):
    side, event = torch.Stream("sim"), torch.Event("sim")
    host = torch.arange(1000.0).pin_memory()
    there = copy_up(host, side, event)
    torch.accelerator.current_stream().wait_event(event)
    assert (there + 1).cpu().equal(host + 1)
    assert sim.races() == []
    assert [each.needed for each in sim.wait_list()] == [True]


def test_a_copy_up_that_is_not_waited_for(sim):
    sim.set_delay(LATE, LATE)
    side = torch.Stream("sim")
    there = copy_up(torch.ones(1000).pin_memory(), side)
    assert (there + 1).cpu().isnan().all()
    (race,) = sim.races()
    assert (race.first, race.second, race.first_writes, race.second_writes) == ("copy up", "aten::add", True, False)
    assert (race.low, race.high) == (there.data_ptr(), there.data_ptr() + 4000)
    assert f"stream {side.stream_id} of sim:0" in str(race)
    assert "stream 0 of sim:0" in str(race)


def test_streams_have_names(sim):
    side = torch.Stream("sim")
    sim.name_stream(side, "the way up")
    there = copy_up(torch.ones(10).pin_memory(), side)
    _ = there + 1
    assert {each.first_actor for each in sim.races()} == {"the way up"}
    sim.name_stream(side, f"stream {side.stream_id} of sim:0")


def test_a_copy_down_that_is_waited_for(sim):
    side, ready, done = torch.Stream("sim"), torch.Event("sim"), torch.Event("sim")
    host = torch.zeros(1000).pin_memory()
    there = torch.arange(1000, device="sim") * 2.0
    ready.record()
    side.wait_event(ready)
    with side, sim.watch_host():
        host.copy_(there, non_blocking=True)
        done.record()
        done.synchronize()
        assert host.equal(torch.arange(1000) * 2.0)
    assert sim.races() == []
    assert [each.needed for each in sim.wait_list()] == [True, True]


def test_a_copy_down_that_is_not_waited_for(sim):
    sim.set_delay(LATE, LATE)
    side = torch.Stream("sim")
    host = torch.zeros(1000).pin_memory()
    there = torch.ones(1000, device="sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side, sim.watch_host():
        host.copy_(there, non_blocking=True)
        assert not host.equal(torch.ones(1000))
    assert found(sim) == {("copy down", "aten::equal")}


def test_a_copy_down_that_does_not_wait_for_what_it_copies(sim):
    """Computing is done when the host says so: the values are right here, and the checker alone knows."""
    side = torch.Stream("sim")
    host = torch.zeros(1000).pin_memory()
    there = torch.zeros(1000, device="sim").add_(1)
    made = there * 2
    with side:
        host.copy_(there, non_blocking=True)
        host.copy_(made, non_blocking=True)
    side.synchronize()
    assert found(sim) == {("aten::add_", "copy down"), ("aten::mul", "copy down")}


def test_memory_of_the_host_that_is_used_again_too_early(sim):
    sim.set_delay(LATE, LATE)
    host = torch.ones(1000).pin_memory()
    with sim.watch_host():
        there = copy_up(host, torch.accelerator.current_stream())
        host.fill_(2)
    assert there.cpu().equal(torch.full((1000,), 2.0))
    assert found(sim) == {("copy up", "aten::fill_")}


def test_what_the_host_announces(sim):
    sim.set_delay(LATE, LATE)
    host = torch.ones(1000).pin_memory()
    torch.empty(1000, device="sim").copy_(host, non_blocking=True)
    sim.host_access(host.data_ptr(), 4000, False, "an innocent reader")
    assert sim.races() == []
    sim.host_access(host.data_ptr() + 3996, 100, True, "an update")
    race = sim.races()[0]
    assert (race.second, race.second_actor, race.high - race.low) == ("an update", "the host", 4)


@pytest.mark.parametrize("way", ["event", "stream", "device", "query", "stream query", "copy", "item"])
def test_ways_to_wait(sim, way):
    """Each puts the host after the copy, in reality and for the checker."""
    sim.set_delay(10_000, 20_000)
    event, host = torch.Event("sim"), torch.zeros(1000).pin_memory()
    there = torch.ones(1000, device="sim")
    with sim.watch_host():
        host.copy_(there, non_blocking=True)
        event.record()
        stream = torch.accelerator.current_stream()
        polled = {"query": event.query, "stream query": stream.query}.get(way)
        if way == "event":
            event.synchronize()
        elif way == "stream":
            stream.synchronize()
        elif way == "device":
            torch.accelerator.synchronize()
        elif way == "copy":
            there.cpu()
        elif way == "item":
            there.sum().item()
        else:
            assert polled is not None
            while not polled():
                time.sleep(1e-4)
        assert host.equal(torch.ones(1000))
    assert sim.races() == []


def test_copies_of_a_stream_are_in_order(sim):
    first, second = torch.zeros(1000).pin_memory(), torch.arange(1000.0).pin_memory()
    there, back = torch.empty(1000, device="sim"), torch.empty(1000).pin_memory()
    for each in (first, second):
        there.copy_(each, non_blocking=True)
    other = torch.empty_like(there).copy_(there, non_blocking=True)
    back.copy_(other, non_blocking=True)
    torch.accelerator.synchronize()
    assert back.equal(second)
    assert sim.races() == []


def test_what_the_host_has_waited_for_is_ordered_for_all(sim):
    side, event = torch.Stream("sim"), torch.Event("sim")
    there = copy_up(torch.ones(10).pin_memory(), side, event)
    event.synchronize()
    torch.accelerator.current_stream().wait_event(event)
    assert (there + 1).cpu().equal(torch.full((10,), 2.0))
    assert sim.races() == []
    assert [each.needed for each in sim.wait_list()] == [True, False]


def test_an_event_is_as_it_was_recorded_last(sim):
    """A wait is for what an event meant when the wait was enqueued."""
    sim.set_delay(LATE, LATE)
    side, event = torch.Stream("sim"), torch.Event("sim")
    early = copy_up(torch.ones(10).pin_memory(), side, event)
    torch.accelerator.current_stream().wait_event(event)
    late = copy_up(torch.ones(10).pin_memory(), side, event)
    assert (early + 1).cpu().equal(torch.full((10,), 2.0))
    assert sim.races() == []
    assert (late + 1).cpu().isnan().all()
    assert ("copy up", "aten::add") in found(sim)


def test_copies_that_do_not_block_come_late_and_others_at_once(sim):
    there, pinned, event = torch.empty(10, device="sim"), torch.ones(10).pin_memory(), torch.Event("sim")

    def seconds(host, **how):
        start = time.monotonic()
        there.copy_(host, **how)
        return time.monotonic() - start

    sim.set_delay(3_000_000, 3_000_000)
    assert seconds(torch.ones(10)) < 2
    assert seconds(pinned) < 2
    sim.set_delay(LATE, LATE)
    assert seconds(torch.ones(10), non_blocking=True) >= LATE / 1e6, "memory that is not pinned is waited for"
    start = time.monotonic()
    there.copy_(pinned, non_blocking=True)
    event.record()
    assert not event.query()
    event.synchronize()
    assert time.monotonic() - start >= LATE / 1e6


def test_delays_are_drawn(sim):
    """By the seed, the stream and the place of the copy in it; the copies sleep as long."""
    one, other = torch.Stream("sim"), torch.Stream("sim")

    def drawn(stream, seed=3):
        sim.set_delay(100, 3000, seed)
        return [sim.delay(stream, number) for number in range(50)]

    assert drawn(one) == drawn(one)
    assert len({*drawn(one), *drawn(other), *drawn(one, seed=4)}) > 100
    assert all(100 <= each <= 3000 for each in drawn(one))
    event, before = (torch.Event("sim", enable_timing=True) for _ in range(2))
    longest = max(range(50), key=drawn(one).__getitem__)
    kept = [copy_up(torch.ones(10).pin_memory(), one, before) for _ in range(longest)]
    before.synchronize()
    start = time.monotonic()
    kept.append(copy_up(torch.ones(10).pin_memory(), one, event))
    event.synchronize()
    assert len(kept) == longest + 1
    assert time.monotonic() - start >= drawn(one)[longest] / 1e6
    assert before.elapsed_time(event) >= drawn(one)[longest] / 1e3


@pytest.mark.parametrize("way", ["up", "down", "within"])
def test_what_a_copy_will_write_is_poisoned_when_it_starts(sim, way):
    sim.set_delay(500_000, 500_000)
    target, source = (torch.zeros(10, device="sim"), torch.ones(10, device="sim"))
    torch.accelerator.synchronize()
    if way == "up":
        source = torch.ones(10).pin_memory()
    elif way == "down":
        target = torch.zeros(10).pin_memory()
    side = torch.Stream("sim")
    with side:
        target.copy_(source, non_blocking=True)
    time.sleep(0.1)
    assert target.isnan().all().item()
    side.synchronize()
    assert target.cpu().equal(torch.ones(10))


def step(sim, host, back):
    """A correct program with a copy up, a use, and a copy down on streams of their own, and host memory used again."""
    up, down, compute = torch.Stream("sim"), torch.Stream("sim"), torch.accelerator.current_stream()
    came, computed, went = (torch.Event("sim") for _ in range(3))
    with sim.watch_host():
        for turn in range(2):
            host.fill_(turn + 1)
            there = copy_up(host, up, came)
            there.record_stream(compute)
            compute.wait_event(came)
            result = there * 3
            computed.record()
            down.wait_event(computed)
            with down:
                back.copy_(result, non_blocking=True)
                went.record()
            result.record_stream(down)
            went.synchronize()
            back.abs_()


def test_each_wait_of_a_program_is_missed(sim):
    host, back = torch.ones(1000).pin_memory(), torch.ones(1000).pin_memory()
    torch.accelerator.synchronize()
    sim.reset()
    step(sim, host, back)
    assert sim.races() == []
    assert back.equal(torch.full((1000,), 6.0))
    waits = sim.wait_list()
    assert [each.needed for each in waits] == [True] * 6
    missed = []
    for number in range(len(waits)):
        sim.reset()
        sim.forget_wait(number)
        step(sim, host, back)
        assert sim.waits() == len(waits)
        missed.append(bool(sim.races()))
    assert missed == [True] * 6


def test_a_wait_that_is_forgotten_is_none(sim):
    sim.set_delay(LATE, LATE)
    event, host = torch.Event("sim"), torch.zeros(10).pin_memory()
    for wait in (event.synchronize, event.query, torch.accelerator.synchronize, torch.sim.current_stream().synchronize):
        torch.accelerator.synchronize()
        sim.reset()
        sim.forget_wait(0)
        host.zero_()
        host.copy_(torch.ones(10, device="sim"), non_blocking=True)
        event.record()
        assert wait() in (None, True)
        assert not host.equal(torch.ones(10))
        sim.host_access(host.data_ptr(), 40, False, "a reader")
        assert len(sim.races()) == 1


def test_asking_is_one_wait_for_each_recording(sim):
    sim.set_delay(LATE, LATE)
    event, host = torch.Event("sim"), torch.ones(10).pin_memory()
    sim.forget_wait(0)
    for known in (True, False):
        torch.empty(10, device="sim").copy_(host, non_blocking=True)
        event.record()
        assert [event.query(), event.query()] == [known, known]
    torch.sim.current_stream().synchronize()
    assert event.query()
    assert [each.text for each in sim.wait_list()] == [
        "the host asks for an event",
        "the host asks for an event",
        "the host waits for stream 0 of sim:0",
    ]


def test_a_device_that_is_lost(sim):
    """At an operation; from then on for all that asks it, and for nobody who frees what was on it or asks the other."""
    there, event, stream = torch.ones(10, device="sim"), torch.Event("sim"), sim.current_stream()
    pinned = torch.ones(10).pin_memory()
    event.record()
    sim.lose(after=2)
    there.add_(1)
    there.copy_(pinned, non_blocking=True)
    for ask in (
        partial(there.add_, 1),
        partial(there.copy_, pinned, non_blocking=True),
        there.cpu,
        partial(torch.empty, 1, device="sim"),
        event.record,
        event.query,
        event.synchronize,
        partial(stream.wait_event, event),
        stream.synchronize,
        torch.accelerator.synchronize,
    ):
        with pytest.raises(RuntimeError, match="sim:0 is lost: nothing that is on it can be reached any more"):
            ask()
    assert torch.ones(1, device="sim:1").item() == 1
    del there
    sim.reset()
    assert torch.ones(1, device="sim").item() == 1


def test_devices_copy_to_one_another(sim):
    there = torch.arange(10.0, device="sim:1") * 2
    here = there.to("sim:0")
    assert (there.device.index, here.device.index) == (1, 0)
    assert here.cpu().equal(torch.arange(10.0) * 2)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device, but found sim:1 and sim:0"):
        there + here
    with pytest.raises(RuntimeError, match="there is no device sim:2"):
        torch.empty(1, device="sim:2")


def test_streams_in_torch(sim):
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    assert torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 2
    side = torch.Stream("sim")
    before = torch.accelerator.current_stream()
    with side:
        assert torch.accelerator.current_stream() == side == sim.current_stream()
    with sim.stream(side):
        assert torch.accelerator.current_stream() == side
    assert torch.accelerator.current_stream() == before == sim.default_stream()
    torch.accelerator.set_stream(side)
    assert sim.current_stream() == side
    sim.set_stream(before)
    with sim.device(1):
        assert (torch.accelerator.current_device_index(), torch.empty(1, device="sim").device.index) == (1, 1)
    assert torch.accelerator.current_device_index() == 0
    event = side.record_event()
    assert event.query()
    side.synchronize()
