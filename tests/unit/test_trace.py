"""A trace of what an engine does: its format, that all is in it, and that training does not notice."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import pytest
import torch
from models import batches, build, loss_of
from running import Mode, config_of, started, state_of, weights_of
from trace_format import check, crossings, faults_of

from zeroxide import _core
from zeroxide.errors import BudgetError, ConfigError, ModelError, StorageError

MEMORY = Mode()
DISK = Mode("nvme", "nvme", "fp32", 2, "auto", 8192, 1 << 20)


def train(engine, feed):
    losses = []
    for batch in feed:
        loss = loss_of(engine(**batch))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def interrupt():
    raise KeyboardInterrupt


def of(trace, name):
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["name"] == name]


@pytest.mark.parametrize("mode", [MEMORY, DISK], ids=str)
def test_a_trace_has_the_format_and_everything_in_it(mode, tmp_path):
    path = tmp_path / "trace.json"
    with started(build("gpt"), config=config_of(mode, tmp_path, "fp32")) as engine:
        train(engine, batches("gpt", 1))
        engine.finish_step()
        before, begin = engine.io(), time.monotonic()
        with engine.trace(path):
            train(engine, batches("gpt", 2))
        after, seconds = engine.io(), time.monotonic() - begin
        units = {unit.name for unit in engine.plan().units}
        held = engine.memory()
    trace = check(path)
    assert trace["otherData"]["left_out"] == 0
    assert [event["args"]["step"] for event in of(trace, "forward")] == [2, 3]
    assert [event["args"]["step"] for event in of(trace, "finish")] == [3]
    assert [len(of(trace, name)) for name in ("forward", "backward", "step", "finish")] == [2, 2, 2, 1]
    assert all(event["ts"] + event["dur"] <= 1e6 * seconds for event in trace["traceEvents"] if event["ph"] == "X")
    assert len(of(trace, "update")) == after["tiles_updated"] - before["tiles_updated"] or mode == MEMORY
    assert of(trace, "update")
    gathered = {event["args"]["unit"] for event in of(trace, "gather")}
    assert gathered <= units
    assert len(gathered) > 1
    for name, key, count in (("read", "read_bytes", "reads"), ("write", "write_bytes", "writes")):
        found = of(trace, name)
        assert sum(event["args"]["bytes"] for event in found) == after[key] - before[key]
        assert len(found) == after[count] - before[count]
    assert bool(of(trace, "read")) == (mode == DISK)
    samples = trace["otherData"]["memory"]
    assert [sample["after"] for sample in samples] == ["forward", "backward", "step"] * 2 + ["finish"]
    for sample in samples:
        assert sample["buckets"]["recorder"] > 0
        assert sample["resident"] > 0
        assert {name for name, usage in held.items() if isinstance(usage, dict)} >= set(sample["buckets"])
    assert held["recorder"]["current"] == 0, "its memory is given back"
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C" and event["name"] == "payload"]
    assert [event["args"] for event in counters] == [sample["buckets"] for sample in samples]


def test_a_step_on_disk_goes_on_until_its_units_are_used(tmp_path):
    """Each unit is updated after the step has begun and before the next forward has ended: by a call of the thread that
    trains, nested in that, or by the core's own thread between calls, which is a row of its own."""
    path = tmp_path / "trace.json"
    with started(build("gpt"), config=config_of(DISK, tmp_path, "fp32")) as engine, engine.trace(path):
        train(engine, batches("gpt", 2))
    trace = check(path)
    second = of(trace, "forward")[1]
    begun, ended = of(trace, "step")[0]["ts"], second["ts"] + second["dur"]
    updates = [event for event in of(trace, "update") if event["ts"] < ended]
    assert updates
    assert all(begun <= event["ts"] and event["ts"] + event["dur"] <= ended for event in updates)
    rows = {event["tid"] for event in updates}
    assert len(rows - {second["tid"]}) <= 1


@pytest.mark.parametrize("mode", [MEMORY, DISK], ids=str)
def test_recording_changes_no_bit(mode, tmp_path):
    found = []
    for traced in (False, True):
        with started(build("gpt"), config=config_of(mode, tmp_path, "fp32")) as engine:
            feed = batches("gpt", 4)
            losses = train(engine, feed[:1])
            if traced:
                with engine.trace(tmp_path / "trace.json"):
                    losses += train(engine, feed[1:3])
            else:
                losses += train(engine, feed[1:3])
            losses += train(engine, feed[3:])
            found.append((losses, weights_of(engine), state_of(engine, ["exp_avg", "exp_avg_sq"])))
    (plain, weights, state), (recorded, weights_too, state_too) = found
    assert plain == recorded
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights)
    assert all(torch.equal(a, b) for name in state for a, b in zip(state[name], state_too[name], strict=True))


def test_what_is_forgotten_is_not_written(tmp_path):
    path = tmp_path / "trace.json"
    with started(build("gpt"), config=config_of(DISK, tmp_path, "fp32")) as engine, engine.trace(path) as trace:
        for batch in batches("gpt", 4):
            moment = time.monotonic_ns()
            train(engine, [batch])
        trace.forget_before(moment)
    found = check(path)
    assert [event["args"]["step"] for event in of(found, "forward")] == [4]
    assert [sample["step"] for sample in found["otherData"]["memory"]] == [4, 4, 4, 4]
    assert of(found, "update")
    assert found["otherData"]["left_out"] == 0


def test_of_more_events_than_asked_for_the_newest_stay(tmp_path):
    path = tmp_path / "trace.json"
    with started(build("gpt"), config=config_of(DISK, tmp_path, "fp32")) as engine:
        with engine.trace(path):
            train(engine, batches("gpt", 1))
        whole = check(path)
        with engine.trace(path, events=10):
            train(engine, batches("gpt", 1))
    trace = check(path)
    kept = [event for event in trace["traceEvents"] if event.get("cat") in ("core", "disk")]
    assert len(kept) == 10
    every = sum(event.get("cat") in ("core", "disk") for event in whole["traceEvents"])
    assert trace["otherData"]["left_out"] >= every // 2
    finish = of(trace, "finish")[0]
    assert max(event["ts"] for event in kept) >= finish["ts"] - 1000.0
    assert Counter(event["name"] for event in kept)["write"] > 0


def test_what_cannot_be_traced_is_refused_and_training_goes_on(tmp_path):
    config = config_of(MEMORY, tmp_path, "fp32")
    with started(build("gpt"), config=config) as engine:
        with (
            pytest.raises(ConfigError, match="trace: expected 1 to 16777216 events, got 0"),
            engine.trace("x", events=0),
        ):
            pass
        with (
            engine.trace(tmp_path / "a.json"),
            pytest.raises(ModelError, match="records a trace already"),
            engine.trace("b"),
        ):
            pass
        check(tmp_path / "a.json")
        missing = tmp_path / "missing" / "trace.json"
        with pytest.raises(StorageError, match="cannot write the trace to") as caught, engine.trace(missing):
            pytest.fail("refused before anything is recorded")
        assert caught.value.path == str(missing)
        (tmp_path / "folder").mkdir()
        with pytest.raises(StorageError, match="Is a directory"), engine.trace(tmp_path / "folder"):
            pass
        assert engine.memory()["recorder"]["current"] == 0
        train(engine, batches("gpt", 1))
        with engine.trace(tmp_path / "a.json"):
            train(engine, batches("gpt", 1))
        assert len(of(check(tmp_path / "a.json"), "step")) == 1
    assert not list(tmp_path.glob("*.writing"))


def test_a_trace_is_in_the_budget(tmp_path):
    # 16 million events take more than what is left here, whatever the process has already.
    budget = _core.resident()["rss"] + (512 << 20)
    with started(build("gpt"), config=config_of(MEMORY, tmp_path, "fp32"), host_memory=budget) as engine:
        with pytest.raises(BudgetError, match="recorder") as caught, engine.trace(tmp_path / "a.json", events=1 << 24):
            pass
        assert caught.value.bucket == "recorder"
        train(engine, batches("gpt", 1))


def test_what_ends_a_script_inside_is_heard_and_the_trace_is_there(tmp_path):
    path = tmp_path / "trace.json"
    with started(build("gpt"), config=config_of(DISK, tmp_path, "fp32")) as engine:
        feed = itertools.chain(batches("gpt", 1), (interrupt() for _ in range(1)))
        with pytest.raises(KeyboardInterrupt), engine.trace(path):
            train(engine, feed)
        assert len(of(check(path), "step")) == 1
        with engine.trace(path):
            engine.destroy()


def test_the_clocks_of_python_are_those_of_the_core():
    assert time.get_clock_info("perf_counter").implementation == time.get_clock_info("monotonic").implementation
    assert "CLOCK_MONOTONIC" in time.get_clock_info("monotonic").implementation


def test_what_the_format_does_not_allow_is_found():
    good = {"ph": "X", "cat": "core", "name": "gather", "pid": 0, "tid": 1, "ts": 1.0, "dur": 2.0, "args": {}}
    assert faults_of(good) == []
    for key, value in (("ph", "Y"), ("ts", -1.0), ("dur", None), ("name", ""), ("tid", "a"), ("args", 3)):
        assert faults_of({**good, key: value}), key
    assert faults_of({"ph": "C", "name": "payload", "pid": 0, "tid": 0, "ts": 1, "args": {"a": "b"}})
    assert crossings([good, {**good, "ts": 2.0, "dur": 2.0}])
    assert not crossings([good, {**good, "ts": 2.0, "dur": 1.0}, {**good, "ts": 3.0}])
    assert not crossings([good, {**good, "ts": 2.0, "dur": 2.0, "tid": 2}])
