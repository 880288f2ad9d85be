"""What `zeroxide train` says at its end of what was planned, and of what it wrote to the disk."""

from __future__ import annotations

import json

import pytest
import torch
from test_cli_plan import machine
from torch import nn

import zeroxide
from zeroxide.cli import main
from zeroxide.cli.planning.measured import Measurements, Planned, cache_file, machine_key
from zeroxide.cli.training.achieved import planned_for
from zeroxide.cli.training.job import run
from zeroxide.cli.training.models import choose_model
from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.run_folder import Record

pytest.importorskip("transformers")

__all__ = ["machine"]

PLANNED = Planned(process=1 << 30, read=1, written=2, forward_and_update=0.5, backward=0.25)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Keeps `PLANNED` for a run of the tiny model with its state in a directory, which it returns."""
    monkeypatch.setenv("ZEROXIDE_CACHE_DIR", str(tmp_path / "cache"))
    disk = tmp_path / "disk"
    disk.mkdir()
    key = Planned.key(
        choose_model("tiny").digest(),
        dtype="bf16",
        batch=2,
        sequence=32,
        accumulate=1,
        ranks=1,
        home=str(disk),
        option="nvme, split",
    )
    Measurements(None, {}, {key: PLANNED}).save(cache_file(), machine_key(1))
    return disk


def options_for(disk, tmp_path, **more) -> TrainOptions:
    text = tmp_path / "text.py"
    text.write_text("".join(f"def function_{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(400)))
    given = {
        "model": "tiny",
        "data": (str(text),),
        "offload": f"nvme:{disk}",
        "steps": 5,
        "batch_size": 2,
        "seq_len": 32,
        "threads": 1,
        "sample_tokens": 0,
        "eval_batches": 1,
        "trace": "none",
        "out": str(tmp_path / "run"),
        **more,
    }
    return TrainOptions(**given).checked()


def test_a_run_says_what_was_planned_reached_and_written(known, tmp_path, capsys):
    assert run(options_for(known, tmp_path)) == 0
    said = capsys.readouterr().out
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    by_kind = {each["event"]: each for each in events}
    steps = [each for each in events if each["event"] == "step"]
    wear, planned = by_kind["wear"], by_kind["planned"]
    # What is written between the steps is of no step: filling the state before the first, and the end of the last.
    assert wear["total"] >= sum(each["write_bytes"] for each in steps)
    assert wear["of_step"] == sorted(each["write_bytes"] for each in steps[2:])[1]
    assert "written in 5 steps" in said
    assert planned["expected"] == {
        "process": 1 << 30,
        "read": 1,
        "written": 2,
        "forward_and_update": 0.5,
        "backward": 0.25,
    }
    assert planned["took"]["process"] == by_kind["end"]["peak_rss"]
    middle = sorted(each["backward_seconds"] for each in steps[2:])[1]
    assert planned["took"]["backward"] == pytest.approx(middle)
    assert "1 GiB of memory, reached" in said
    assert "backward 0.250 s, took" in said


def test_a_run_in_memory_that_was_not_planned_says_neither(known, tmp_path, capsys):
    assert run(options_for(known, tmp_path, offload="cpu")) == 0
    said = capsys.readouterr().out
    assert "planned" not in said
    assert "wear" not in said


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 64}, {"batch_size": 4}, {"format": "fp32"}, {"activation_checkpointing": True}, {"accumulate": 2}],
)
def test_a_plan_is_of_one_run(known, tmp_path, change):
    record = Record(options_for(known, tmp_path), choose_model("tiny").digest(), "corpus")
    assert planned_for(record.options, record, ranks_here=1) == PLANNED
    other = options_for(known, tmp_path, **change)
    assert planned_for(other, record, ranks_here=1) is None


@pytest.mark.parametrize("home", ["cpu", "nvme"])
def test_a_run_finds_what_the_command_has_planned(home, machine, tmp_path, capsys):
    """From the command to the run's log. Catches: a plan that builds models from the config by which it is kept, which
    transformers changes then."""
    words = ["--batch", "2", "--sequence", "32", "--disk", str(machine)]
    assert main(["plan", "tiny", *words]) == 0
    offload = f"nvme:{machine}" if home == "nvme" else home
    assert run(options_for(machine, tmp_path, offload=offload, threads=0, steps=3)) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (found,) = [each for each in events if each["event"] == "planned"]
    assert found["expected"]["process"] > 100 << 20


def test_a_run_that_recomputes_has_the_same_losses_and_a_plan_of_its_own(known, tmp_path, capsys):
    """Catches: an option that does not come to the engine, and figures of a run that keeps its activations."""
    key = Planned.key(
        choose_model("tiny").digest(),
        dtype="bf16",
        batch=2,
        sequence=32,
        accumulate=1,
        ranks=1,
        home="",
        option="cpu, split, recompute 2",
    )
    Measurements(None, {}, {key: PLANNED}).save(cache_file(), machine_key(1))
    losses = {}
    for asked in ("all", "1", "none"):
        out = tmp_path / asked
        assert run(options_for(known, tmp_path, offload="cpu", recompute=asked, steps=3, out=str(out))) == 0
        events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses[asked] = [each["loss"] for each in events if each["event"] == "step"]
        assert any(each["event"] == "planned" for each in events) is (asked == "all")
        blocks = {"all": "2 of 2", "1": "1 of 2"}
        assert (asked in blocks) is any(
            f"activations of {blocks.get(asked)} blocks computed again" in line for line in events[0]["plan"]
        )
    assert losses["all"] == losses["1"] == losses["none"]


def test_a_run_that_updates_in_backward_has_the_same_losses_and_a_plan_of_its_own(known, tmp_path, capsys):
    """Catches: an option that does not come to the engine, and figures of a run whose updates wait."""
    disk = tmp_path / "blocks"
    key = Planned.key(
        choose_model("tiny").digest(),
        dtype="bf16",
        batch=2,
        sequence=32,
        accumulate=1,
        ranks=1,
        home=str(disk),
        option="nvme, split, early",
    )
    Measurements(None, {}, {key: PLANNED}).save(cache_file(), machine_key(1))
    losses, said = {}, {}
    for asked in ("never", "always", "adaptive"):
        out = tmp_path / asked
        options = options_for(
            known, tmp_path, offload=f"nvme:{disk}", update_in_backward=asked, steps=3, out=str(out), clip=1e-3
        )
        assert run(options) == 0
        events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses[asked] = [each["loss"] for each in events if each["event"] == "step"]
        assert any(each["event"] == "planned" for each in events) is (asked == "always")
        said[asked] = [line for line in events[0]["plan"] if "update" in line]
    assert losses["never"] == losses["always"] == losses["adaptive"]
    assert any("backward updates before it is known" in line for line in said["always"])
    # Gradients of so small a model wait in memory.
    assert any('though update_in_backward is "adaptive"' in line for line in said["adaptive"])
    assert not any("backward" in line for line in said["never"])


def test_bytes_written_to_disk_are_in_the_log_of_steps(tmp_path):
    torch.manual_seed(0)
    log = tmp_path / "steps.jsonl"
    engine, *_ = zeroxide.initialize(
        model=nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)),
        lr=1e-3,
        dtype="bf16",
        offload=f"nvme:{tmp_path}",
        config={"zeroxide": {"log": str(log)}},
    )
    counted = []
    for _ in range(4):
        engine.backward(engine(torch.ones(1, 64, dtype=torch.bfloat16)).float().sum())
        engine.step()
        engine.finish_step()
        counted.append(engine.io()["write_bytes"])
    engine.destroy()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    written = [row["disk_written_bytes"] for row in rows]
    assert written == sorted(written)
    # A line is written when `step` returns, before the update that goes on after it has ended.
    assert all(before <= after for before, after in zip(written, counted, strict=True))
    assert written[-1] >= counted[-2] > 0


def test_without_a_disk_the_log_of_steps_has_no_such_bytes(tmp_path):
    log = tmp_path / "steps.jsonl"
    engine, *_ = zeroxide.initialize(
        model=nn.Linear(8, 8), lr=1e-3, dtype="bf16", offload="cpu", config={"zeroxide": {"log": str(log)}}
    )
    engine.backward(engine(torch.ones(1, 8, dtype=torch.bfloat16)).float().sum())
    engine.step()
    engine.destroy()
    assert "disk_written_bytes" not in json.loads(log.read_text())
