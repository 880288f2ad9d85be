"""`zeroxide bench`: what it measures is there, comes from runs that train, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest
from forked_cli import run_cli

from zeroxide.cli import main
from zeroxide.cli.measuring import process
from zeroxide.cli.measuring.process import Task
from zeroxide.errors import ZeroxideError

bench = importlib.import_module("zeroxide.cli.bench")

SMALL = ["--layers", "1", "--width", "64", "--seq-len", "8", "--steps", "2", "--rounds", "1", "--parameters", "1000000"]


def test_every_home_is_measured_beside_torch(tmp_path, monkeypatch, capsys):
    """In one process, which is quicker. Catches: a home left out, disk bytes of another run, files left behind."""
    monkeypatch.setattr(bench, "_run", lambda _, task: dataclasses.asdict(process.measure(task)))
    assert main(["bench", str(tmp_path), "--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {each["name"]: each for each in found["rows"]}
    trained = ["train, torch", *(f"train, zeroxide, offload {home}" for home in ("none", "cpu", "nvme"))]
    assert list(rows) == ["update, torch", "update, zeroxide", *trained]
    assert all(0 < each["fastest"] <= each["seconds"] <= each["slowest"] for each in rows.values())
    assert all(each["peak_bytes"] > 1 << 20 for each in rows.values())
    count = rows["train, torch"]["parameters"]
    # Embeddings of tokens and places; one block: attention, two norms, two linear layers; the last norm.
    assert count == 16_384 * 64 + 8 * 64 + (4 * 64 * 64 + 4 * 64) + 4 * 64 + (2 * 4 * 64 * 64 + 5 * 64) + 2 * 64
    # A tied embedding of 16,384 random rows: the loss is that of a uniform guess, within what a few steps change.
    assert all(abs(rows[name]["loss"] - 9.704) < 0.2 for name in trained)
    # All that is not read or written whole is padding: 24 bytes a parameter, and weights where they do not stay.
    assert 20 < rows["train, zeroxide, offload nvme"]["disk_bytes_per_parameter"] < 34
    assert rows["train, zeroxide, offload cpu"]["disk_bytes_per_parameter"] == 0
    assert found["disk"]["path"] == str(tmp_path)
    assert found["disk"]["read_bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


def test_steps_that_warm_up_do_not_count(monkeypatch):
    """Catches: the first step in the times, a step too few, a last step whose end nobody sees."""
    clock = iter([0.0, 100.0, 200.0, 300.0, 301.0, 303.0])
    monkeypatch.setattr(process.time, "perf_counter", lambda: next(clock))
    done = []
    assert process._timed(done.append, 2) == [1.0, 2.0]
    assert done == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--width", "100"], "--width 100: expected a multiple of 64"),
        (["--dtype", "int8"], "--dtype int8: expected one of bf16, fp16, fp32"),
        (["/no/such"], "/no/such is no directory"),
        (["/proc/version"], "/proc/version is no directory"),
        (["~nobodyhere/x"], "no such user"),
        (["--steps", "0"], "should be greater than or equal to 1"),
        (["/proc"], "/proc"),
    ],
)
def test_mistakes_are_one_line(arguments, line):
    ended = run_cli("bench", *arguments)
    assert ended.returncode in (1, 2)
    assert line in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_what_a_contestant_refuses_is_said(tmp_path):
    """In processes. Catches: a refusal that looks like a crash, an end without a word that is taken for a result."""
    done = bench._run("mine", Task(who="zeroxide", what="update", parameters=1_000_000, steps=1, threads=1))
    assert done["parameters"] == 1_000_000
    assert len(done["seconds"]) == 1
    refused = Task(who="zeroxide", what="train", layers=1, width=64, columns=8, offload="cpu", host_memory="1MiB")
    with pytest.raises(ZeroxideError, match=r"^mine: .*host_memory"):
        bench._run("mine", refused)
    with pytest.raises(ZeroxideError, match=r"^mine: .*JSON|^mine: .*Error"):
        bench._run("mine", dataclasses.replace(refused, who="zeroxide", layers="many"))


def test_torch_and_zeroxide_train_the_same():
    """Losses after a few steps, in fp32: the same data, the same optimizer. The bound is 100 times the spacing of fp32
    at the loss, for sums in another order. Catches: another learning rate or batch on one side."""
    losses = [
        process.measure(Task(who=who, what="train", dtype="fp32", layers=1, width=64, columns=8, steps=3)).loss
        for who in ("torch", "zeroxide")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=100 * 2**-23)
