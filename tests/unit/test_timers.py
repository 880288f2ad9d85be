"""wall_clock_breakdown against a clock of the test's own: every bound is logical, none is a guess at speed."""

from __future__ import annotations

import re
import time

import pytest
import torch
from running import started
from torch import nn

from zeroxide.engine import timers
from zeroxide.engine.timers import Timer, Timers
from zeroxide.zero.reduce.timed import TimedReduction

PLAIN = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 3}}
FORWARD, BACKWARD = 0.02, 0.03
PARTS = ["fwd", "bwd", "bwd_inner", "bwd_allreduce", "step", "optimizer_gradients", "optimizer_step"]


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(BACKWARD)
        return grad


class Sleepy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return Slow.apply(self.layer(x)).sum()


def printed(out):
    """The lines of times, each as {name: milliseconds}."""
    lines = [line for line in out.splitlines() if "time (ms)" in line]
    assert all(line.startswith("[Rank 0] time (ms) | ") for line in lines)
    return [{name: float(value) for name, value in re.findall(r"\| (\w+): ([\d.]+)", line)} for line in lines]


@pytest.mark.parametrize("own", [False, True], ids=["engine.backward", "loss.backward"])
def test_the_times_printed_are_within_what_went_by_and_at_least_what_slept(capsys, own):
    """Catches: seconds for milliseconds, times that are not begun anew, a backward of torch's own that is not timed,
    a mean for a sum."""
    accumulation, steps = 2, 2
    config = PLAIN | {"wall_clock_breakdown": True, "gradient_accumulation_steps": accumulation}
    micro_walls, walls, snapshots = [], [], []
    with started(Sleepy(), config=config) as engine:
        assert engine.get_wall_clock_timers() == {}
        for _ in range(steps):
            start = time.perf_counter()
            for _ in range(accumulation):
                micro_start = time.perf_counter()
                loss = engine(torch.ones(1, 4))
                if own:
                    loss.backward()
                else:
                    engine.backward(loss)
                engine.step()
                micro_walls.append((time.perf_counter() - micro_start) * 1e3)
                snapshots.append(engine.get_wall_clock_timers())
            walls.append((time.perf_counter() - start) * 1e3)
    lines = printed(capsys.readouterr().out)
    assert len(lines) == steps * (accumulation + 1)
    # Rounded to a hundredth where they are printed.
    slack = 0.005 * len(PARTS)
    for at, wall in enumerate(walls):
        first = at * (accumulation + 1)
        micros, whole = lines[first : first + accumulation], lines[first + accumulation]
        assert [*whole] == PARTS
        for micro, limit in zip(micros, micro_walls[at * accumulation :], strict=False):
            assert [*micro] == [f"{name}_microstep" for name in PARTS]
            assert micro["fwd_microstep"] >= FORWARD * 1e3
            assert micro["bwd_microstep"] >= BACKWARD * 1e3
            assert micro["fwd_microstep"] + micro["bwd_microstep"] + micro["step_microstep"] <= limit + slack
        assert whole["fwd"] >= accumulation * FORWARD * 1e3
        assert whole["bwd"] >= accumulation * BACKWARD * 1e3
        assert whole["fwd"] + whole["bwd"] + whole["step"] <= wall + slack
        for name in PARTS:
            assert abs(whole[name] - sum(micro[f"{name}_microstep"] for micro in micros)) <= slack
        assert abs(whole["bwd"] - whole["bwd_inner"] - whole["bwd_allreduce"]) <= slack
        assert abs(whole["step"] - whole["optimizer_gradients"] - whole["optimizer_step"]) <= slack
        assert micros[0]["step_microstep"] == 0
        assert whole["step"] > 0
    # What a script is told is what was printed, before it is rounded.
    for said in snapshots:
        assert said["bwd"] == pytest.approx(said["bwd_inner"] + said["bwd_allreduce"], abs=1e-9)
        assert said["step"] == pytest.approx(said["optimizer_gradients"] + said["optimizer_step"], abs=1e-9)
    assert abs(snapshots[-1]["fwd"] - lines[-1]["fwd"]) <= slack
    assert abs(snapshots[0]["fwd_microstep"] - lines[0]["fwd_microstep"]) <= slack


def test_without_the_key_nothing_is_printed_and_seconds_are_counted(capsys):
    with started(Sleepy(), config=PLAIN) as engine:
        start = time.perf_counter()
        loss = engine(torch.ones(1, 4))
        loss.backward()
        engine.step()
        wall = time.perf_counter() - start
        seconds = engine.times()
        assert engine.get_wall_clock_timers() == {}
        assert engine.timers.get_timers() == {}
    assert seconds["forward"] >= FORWARD
    assert seconds["backward"] >= BACKWARD
    assert sum(seconds.values()) <= wall
    assert "time (ms)" not in capsys.readouterr().out


def test_a_backward_that_fails_is_not_counted():
    class Fails(nn.Module):
        on = True

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            y = self.layer(x)
            y.register_hook(lambda grad: 1 / 0 if Fails.on else None)
            return y.sum()

    with started(Fails(), config=PLAIN) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.backward(engine(torch.ones(1, 4)))
        assert engine.times()["backward"] == 0
        Fails.on = False
        start = time.perf_counter()
        engine.backward(engine(torch.ones(1, 4)))
        assert 0 < engine.times()["backward"] <= time.perf_counter() - start


@pytest.mark.parametrize(("device", "breakdown", "waits"), [("meta", True, 2), ("meta", False, 0), ("cpu", True, 0)])
def test_a_time_is_taken_when_the_device_is_done(monkeypatch, device, breakdown, waits):
    waited = []
    monkeypatch.setattr(timers, "wait_for", waited.append)
    clock = Timers(torch.device(device), breakdown=breakdown, prints=False)
    clock.add("fwd", clock.now())
    assert waited == [torch.device(device)] * waits


class Reduction:
    sent = "what was sent"

    def send(self, unit):
        time.sleep(0.02)

    def end_backward(self):
        time.sleep(0.01)

    def abandon(self):
        self.abandoned = True


def test_the_exchange_of_gradients_is_apart_from_the_rest_of_backward():
    clock = Timers(torch.device("cpu"), breakdown=True, prints=False)
    inner = Reduction()
    reduction = TimedReduction(inner, clock.add_reduction)
    start = time.perf_counter()
    clock.begin_backward()
    time.sleep(0.03)
    reduction.send(None)
    reduction.end_backward()
    clock.end_backward()
    wall = (time.perf_counter() - start) * 1e3
    exchange, rest, whole = (clock(name).elapsed() for name in ("bwd_allreduce", "bwd_inner", "bwd"))
    assert exchange >= 30
    assert rest >= 30
    assert abs(whole - exchange - rest) < 1e-6
    assert whole <= wall
    # The next backward begins without it.
    clock.begin_backward()
    clock.end_backward()
    assert clock("bwd_allreduce").elapsed() == 0
    reduction.abandon()
    assert inner.abandoned
    assert reduction.sent == "what was sent"


def test_a_scripts_own_timer(capsys):
    clock = Timers(torch.device("cpu"), breakdown=False, prints=True)
    timer = clock("mine")
    assert clock("mine") is timer
    for _ in range(2):
        timer.start()
        time.sleep(0.01)
        timer.stop()
    assert timer.elapsed(reset=False) >= 20
    assert timer.mean() == timer.elapsed(reset=False) / 2
    clock.log(["mine", "none"], normalizer=2.0, reset=False)
    (line,) = printed(capsys.readouterr().out)
    assert [*line] == ["mine"]
    assert abs(line["mine"] - timer.elapsed() / 2) <= 0.005
    assert timer.elapsed() == timer.mean() == 0


def test_a_timer_that_is_asked_while_it_runs_goes_on():
    moments = iter([1.0, 3.0, 3.5, 4.0])
    timer = Timer(lambda: next(moments))
    timer.start()
    assert timer.elapsed() == 2000
    timer.stop()
    assert timer.elapsed() == 500
    timer.stop()
    assert timer.elapsed() == 0
