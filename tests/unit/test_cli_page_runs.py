"""Whatever ends a run of `zeroxide train` leaves a page about it."""

import json
import os
import signal
import subprocess

import pytest
import torch
from cli_fake_engine import FakeInitialize
from page_reading import read, rows

from zeroxide.cli.training import conclusion
from zeroxide.cli.training.facts import facts_of
from zeroxide.cli.training.job import run
from zeroxide.cli.training.options import TrainOptions
from zeroxide.errors import NumericsError

STEPS = 5


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text.py"
    text.write_text("".join(f"def function_{i}(a, b={i}):\n    return a * {i} + b\n\n\n" for i in range(600)))

    def make(**changes):
        values = {
            "model": "tiny", "data": (str(text),), "steps": STEPS, "batch_size": 2, "seq_len": 16, "dtype": "fp32",
            "threads": 1, "sample_tokens": 0, "eval_batches": 1, "warmup": 0, "schedule": "constant",
            "out": str(tmp_path / "run"),
        }  # fmt: skip
        return TrainOptions(**{**values, **changes})

    return make


def page_of(path):
    return read((path / "report.html").read_text())


def events(path, kind):
    return [event for event in map(json.loads, (path / "log.jsonl").read_text().splitlines()) if event["event"] == kind]


def calls(page):
    return [row[0] for row in rows(page, "Calls of the engine")[1:]]


def test_a_whole_run_and_one_that_goes_on_with_it(options, tmp_path, capsys):
    path = tmp_path / "run"
    assert run(options(save_every=STEPS), initialize=FakeInitialize()) == 0
    assert f"report in {path / 'report.html'}" in capsys.readouterr().out.splitlines()
    page = page_of(path)
    assert f"The run finished after step {STEPS}." in page.text
    steps = events(path, "step")
    assert [row[1] for row in rows(page, "Steps")[1:]] == [f"{each['loss']:.6g}" for each in steps]
    assert calls(page) == ["forward, step 4", "forward, step 5"]
    assert [(each["first"], each["last"]) for each in events(path, "trace")] == [(4, 5)]
    facts = events(path, "start")[0]["facts"]
    assert facts["machine"]["processors"] == len(os.sched_getaffinity(0))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["limit"] == 2 << 30
    assert (
        run(options(steps=STEPS + 1), resume=True, explicit=frozenset({"out", "steps"}), initialize=FakeInitialize())
        == 0
    )
    page = page_of(path)
    assert [row[0] for row in rows(page, "Steps")[1:]] == [str(each) for each in range(1, STEPS + 2)]
    assert calls(page) == ["forward, step 6"]


def test_a_run_that_is_stopped(options, tmp_path):
    path = tmp_path / "run"
    stop = FakeInitialize(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    assert run(options(), initialize=stop) == 128 + signal.SIGTERM
    page = page_of(path)
    assert "The run was stopped by SIGTERM after step 3." in page.text
    assert calls(page) == ["forward, step 2", "forward, step 3"]
    compared = {row[0]: row[1:] for row in rows(page, "Expected and reached")}
    assert compared["whole process"][1] == "1 GiB"
    assert compared["weights"] == ["1 MiB", "1 MiB", "1.000"]


def test_a_run_that_fails_or_is_interrupted(options, tmp_path):
    path = tmp_path / "run"

    def spoil(step):
        if step == 3:
            with torch.no_grad():
                for parameter in broken.engine.module.parameters():
                    parameter.grad.fill_(float("nan"))

    broken = FakeInitialize(spoil)
    with pytest.raises(NumericsError):
        run(options(), initialize=broken)
    page = page_of(path)
    assert "The run failed after step 2: the gradient norm is nan at step 3" in page.text
    assert [row[0] for row in rows(page, "Steps")[1:]] == ["1", "2"]

    def twice(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(options(out=str(tmp_path / "other")), initialize=FakeInitialize(twice))
    assert "The run was interrupted after step 1, before it could save." in page_of(tmp_path / "other").text


def test_steps_that_fp16_leaves_out_are_told(options, tmp_path):
    path = tmp_path / "run"

    def overflow(step):
        left_out = step == 2
        fake.engine.was_step_applied = lambda: not left_out
        if left_out:
            for parameter in fake.engine.module.parameters():
                parameter.grad.fill_(float("inf"))

    fake = FakeInitialize(overflow)
    fake.engine = None
    assert run(options(dtype="fp16", steps=2, trace="none", eval_batches=1), initialize=fake) == 0
    page = page_of(path)
    assert "Left out, since a gradient was not finite: step 2." in page.text
    assert [row[2] for row in rows(page, "Steps")[1:]][1] == "—"
    assert "No trace was recorded" in page.text
    assert not (path / "trace.json").exists()


def test_a_page_that_cannot_be_made_costs_no_run(options, tmp_path, capsys, monkeypatch):
    original = subprocess.run

    def refused(command, **arguments):
        if "report" in command:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nOSError: disk full\n")
        return original(command, **arguments)

    monkeypatch.setattr(conclusion.subprocess, "run", refused)
    assert run(options(steps=1), initialize=FakeInitialize()) == 0
    assert "no report: OSError: disk full" in capsys.readouterr().out.splitlines()
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_command_is_one_that_may_be_given_again(options, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("zeroxide.cli.training.job.facts_of", lambda this: found.append(facts_of(this)) or found[-1])
    for program, expected in (("/x/zeroxide", "zeroxide"), ("/x/cli/__main__.py", "python -m zeroxide.cli")):
        monkeypatch.setattr("sys.argv", [program, "train", "--model", "a b"])
        run(options(steps=1, trace="none", out=str(tmp_path / expected)), initialize=FakeInitialize())
        assert found[-1]["command"] == f"{expected} train --model 'a b'"
