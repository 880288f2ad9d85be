"""`zeroxide train` on two ranks: the numbers of one, one folder, one voice, and one end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from forked_cli import PACKAGE, PROGRAM, TESTS, run_cli, server
from page_reading import read, rows
from safetensors.torch import load_file
from trace_format import check

from zeroxide.cli.training.interrupt import StopRequest
from zeroxide.cli.training.together import Together
from zeroxide.distributed import Ranks
from zeroxide.errors import ConfigError, RanksError

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number:02}.py").write_text(
            "".join(f"def function_{i}(a, b={number}):\n    return a * {i} + b\n\n\n" for i in range(20))
        )
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """Two ranks of the command, forked as torchrun would start them."""

    def __init__(self, folder: Path, *arguments: object, world: int = 2) -> None:
        port, self.folder = free_port(), folder
        self.processes = []
        modules = [str(PACKAGE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        (folder / "program").write_text(PROGRAM)
        for rank in range(world):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            env |= {name: str(value) for name, value in places.items()}
            env["PYTHONPATH"] = os.pathsep.join(modules)
            out, err = folder / f"out-{rank}", folder / f"err-{rank}"
            self.processes.append(server().fork(folder / "program", list(map(str, arguments)), env, out, err))

    def wait(self) -> list[int]:
        try:
            return [each.wait(200) for each in self.processes]
        finally:
            for each in self.processes:
                each.kill()

    def text(self, name: str, rank: int) -> str:
        return (self.folder / f"{name}-{rank}").read_text()


@pytest.fixture
def arguments(text, tmp_path):
    def make(out: str, **changes: object) -> list[object]:
        options = {
            "model": "tiny",
            "data": text,
            "steps": STEPS,
            "batch-size": 2,
            "seq-len": 32,
            "dtype": "fp32",
            "lr": 1e-3,
            "threads": 1,
            "sample-tokens": 4,
            "eval-batches": 2,
            "out": tmp_path / out,
            **changes,
        }
        return ["train", *(word for name, value in options.items() for word in (f"--{name}", value))]

    return make


def events(path: Path, kind: str) -> list[dict]:
    found = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return [each for each in found if each["event"] == kind]


def job(tmp_path: Path, name: str, *words: object) -> Job:
    folder = tmp_path / f"job-{name}"
    folder.mkdir()
    return Job(folder, *words)


def test_two_ranks_see_what_two_micro_batches_would(arguments, tmp_path):
    """Losses agree but for the order of sums: fp32 rounds each of some 2^7 terms by 2^-24, and six steps of Adam move
    no weight by more than its rate. 1e-5 of a loss of 6 is a hundred times that, and 1/1000 of what a step changes."""
    alone = run_cli(*arguments("one", accumulate=2))
    assert alone.returncode == 0, alone.stderr
    two = job(tmp_path, "two", *arguments("two", offload="cpu"))
    assert two.wait() == [0, 0], two.text("err", 0) + two.text("err", 1)
    one, both = ([each["loss"] for each in events(tmp_path / name, "step")] for name in ("one", "two"))
    assert len(both) == STEPS
    assert both == pytest.approx(one, rel=1e-5)
    assert events(tmp_path / "two", "step")[0]["tokens"] == 2 * 32 * 2
    # Rank 0 alone speaks, and the folder is as one rank leaves it.
    assert "6 steps of 128 tokens (2 x 32 x 1 on 2 ranks)" in two.text("out", 0)
    assert two.text("out", 1) == ""
    assert two.text("out", 0).endswith(f"report in {tmp_path / 'two' / 'report.html'}\n")
    page = read((tmp_path / "two" / "report.html").read_text())
    assert [row[1] for row in rows(page, "Steps")[1:]] == [f"{loss:.6g}" for loss in both]
    trace = check(tmp_path / "two" / "trace.json")
    assert (trace["otherData"]["rank"], trace["otherData"]["ranks"]) == (0, 2)
    assert {event["args"]["step"] for event in trace["traceEvents"] if event.get("cat") == "engine"} == {5, 6}
    assert any(event["name"] == "reduce" for event in trace["traceEvents"])
    names = {each.name for each in (tmp_path / "two").iterdir()}
    assert names == {each.name for each in (tmp_path / "one").iterdir()}
    left, right = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor - right[name]).abs().max() <= 1e-4, name


def test_a_signal_to_one_rank_stops_all_after_the_same_step(arguments, tmp_path):
    """And --resume goes on with two ranks, with the bits of a run that nothing stopped, and with no other number."""
    long = {"steps": 400, "schedule": "constant", "warmup": 2, "eval-batches": 1, "offload": "cpu"}
    stopped = job(tmp_path, "stopped", *arguments("run", **long))
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 100
    while not log.is_file() or '"event": "step"' not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(stopped.processes[1].pid, signal.SIGTERM)
    assert stopped.wait() == [128 + signal.SIGTERM] * 2, stopped.text("err", 0) + stopped.text("err", 1)
    (event,) = events(tmp_path / "run", "stopped")
    step = event["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step}").is_dir()
    page = read((tmp_path / "run" / "report.html").read_text())
    assert f"The run was stopped by SIGTERM after step {step}." in page.text
    trace = check(tmp_path / "run" / "trace.json")
    steps = {event["args"]["step"] for event in trace["traceEvents"] if event.get("cat") == "engine"}
    assert steps == set(range(max(1, step - 1), step + 1)), "the newest two"
    assert 0 < step < 400

    words = ["train", "--resume", "--out", tmp_path / "run", "--steps", step + 2]
    refused = run_cli(*words)
    assert refused.returncode == 2
    assert "the number of ranks (run: 2, now: 1)" in refused.stderr
    again = job(tmp_path, "again", *words)
    assert again.wait() == [0, 0], again.text("err", 0) + again.text("err", 1)
    whole = job(tmp_path, "whole", *arguments("whole", **{**long, "steps": step + 2}))
    assert whole.wait() == [0, 0], whole.text("err", 0)
    ends = [{each["step"]: each["loss"] for each in events(tmp_path / name, "step")} for name in ("run", "whole")]
    assert ends[0][step + 2] == ends[1][step + 2]


def test_what_rank_0_refuses_ends_all(arguments, tmp_path):
    refused = job(tmp_path, "refused", *arguments("none", data=tmp_path / "nowhere"))
    assert refused.wait() == [2, 1]
    line = refused.text("err", 0)
    assert line.startswith("zeroxide: error: ")
    assert refused.text("err", 1) == line.replace("error: ", "error: rank 0: ")


def test_events_are_printed_as_json(arguments, tmp_path):
    ended = run_cli(*arguments("json"), "--json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == (tmp_path / "json" / "log.jsonl").read_text()
    kinds = [json.loads(line)["event"] for line in ended.stdout.splitlines()]
    assert kinds[0] == "start"
    assert kinds.count("step") == STEPS
    assert kinds[-1] == "end"


# --- what ranks tell one another -------------------------------------------------------------------------------------


class Told(Ranks):
    """Rank 1 of 2, to which rank 0 has said `said`."""

    def gather_objects(self, value):
        return [SAID.pop(0), value]


SAID: list = []


def test_one_rank_alone_exchanges_nothing():
    stop = StopRequest()
    alone = Together(Ranks(), stop)
    assert (alone.first, alone.world, alone.step(2.5), alone.stopping) == (True, 1, 2.5, False)
    assert alone.from_first(lambda: [1]) == [1]
    alone.wait()
    stop.number = signal.SIGINT
    assert alone.stopping

    def fail():
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        alone.from_first(fail)


def test_another_rank_is_told_and_computes_nothing_of_it():
    stop = StopRequest()
    other = Together(Told(rank=1, world=2), stop)
    SAID[:] = [[["a"], None], [None, "it failed"], [1.0, None], [3.0, signal.SIGTERM]]
    assert not other.first
    assert other.from_first(lambda: pytest.fail("rank 0 does this")) == ["a"]
    with pytest.raises(RanksError, match="rank 0: it failed"):
        other.from_first(lambda: pytest.fail("rank 0 does this"))
    # Its own signal counts once all know of it.
    assert other.step(2.0) == 1.5
    stop.number = signal.SIGINT
    assert not other.stopping
    assert other.step(1.0) == 2.0
    assert other.stopping
    assert stop.number == signal.SIGTERM
