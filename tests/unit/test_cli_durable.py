"""`zeroxide train --durable-every`: a run that is killed goes on from its last commit, with the same losses."""

import json
import os
import subprocess
import sys
import time

import pytest

from zeroxide.cli.training.options import TrainOptions, conflicts
from zeroxide.errors import ConfigError

STEPS, EVERY = 8, 2


def command(tmp_path, name, *more):
    words = ["train", "--model", "tiny", "--offload", f"nvme:{tmp_path / 'disk'}", "--out", str(tmp_path / name)]
    sizes = ["--steps", str(STEPS), "--batch-size", "2", "--seq-len", "32", "--threads", "1", "--sample-tokens", "0"]
    data = ["--data", str(tmp_path / "text"), "--eval-batches", "1", "--trace", "none"]
    return [sys.executable, "-m", "zeroxide.cli", *words, *sizes, *data, "--durable-every", str(EVERY), *more]


def losses(tmp_path, name):
    """By step; of one that was repeated the last."""
    lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        lines = (f"def function_{i}(a, b={number}):\n    return a * {i} + b\n\n\n" for i in range(20))
        (tmp_path / "text" / f"{number:02}.py").write_text("".join(lines))


@pytest.mark.usefixtures("text")
def test_a_killed_run_goes_on_from_its_last_commit(tmp_path):
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True, timeout=240)
    expected = losses(tmp_path, "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))
    log = tmp_path / "killed" / "log.jsonl"
    with subprocess.Popen(command(tmp_path, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not (log.exists() and '"step": 5' in log.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, 9)
    resume = [*command(tmp_path, "killed"), "--resume"]
    done = subprocess.run(resume, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path, "killed")
    assert found == expected
    starts = [json.loads(line) for line in log.read_text().splitlines() if '"event": "start"' in line]
    # Nothing was saved: what it goes on from is a commit, at most the last one.
    assert starts[0]["step"] == 0
    assert 4 <= starts[1]["step"] <= STEPS
    assert starts[1]["step"] % EVERY == 0


def test_what_needs_a_disk_says_so():
    with pytest.raises(ConfigError, match=r"--durable-every 2 needs a disk: give --offload nvme:DIR"):
        TrainOptions(durable_every=2, offload="cpu").checked()
    with pytest.raises(ConfigError, match=r"--durable-every must be at least 0"):
        TrainOptions(durable_every=-1).checked()


def test_commits_are_not_turned_off_by_a_resume():
    run = TrainOptions(durable_every=2, offload="nvme:/x")
    assert conflicts(run, TrainOptions(offload="nvme:/x")) == ["--durable-every (run: 2, now: 0)"]
    assert conflicts(run, TrainOptions(durable_every=5, offload="nvme:/x")) == []
    assert conflicts(TrainOptions(), run) == []


def test_a_format_that_rounds_is_part_of_the_run():
    split, fp32, compact = (TrainOptions(format=format) for format in ("split", "fp32", "compact"))
    assert conflicts(split, fp32) == []
    assert conflicts(split, compact) == ["--format (run: split, now: compact)"]
    assert conflicts(compact, compact) == []
