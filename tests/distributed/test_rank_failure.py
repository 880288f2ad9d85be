"""Ranks that are really killed, stopped or led astray while they train: the others end with one line, nothing stays.

Most jobs use a short timeout; a killed rank is found at once whatever it is. That users' ranks end within 15 s by
default is shown by a thread in the job that would say so.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from launching import Job, Result, run_ranks

HERE = Path(__file__).parent
NAMED = "zeroxide: error: "


def config(transport: str, nvme: Path | None = None, **own: Any) -> dict[str, Any]:
    home = {"device": "nvme", "nvme_path": str(nvme)} if nvme else {"device": "none"}
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3, "offload_param": home, "offload_optimizer": home},
        "zeroxide": {"transport": transport, "threads": 1, "staging_bytes": 4 << 20, **own},
        "steps_per_print": None,
    }


def lose(given: dict[str, Any], phase: str, way: str, world: int = 3) -> list[Result]:
    """The results of a job of which rank 1 was lost. Checks that nothing of it is left."""
    shared = set(os.listdir("/dev/shm"))
    with Job(world, HERE / "failing.py", [json.dumps(given), phase, way], fresh=True) as job:
        results = job.wait([rank for rank in range(world) if rank != 1 or way != "stop"])
        if way == "stop":
            assert results[1].code is None, "a stopped rank stays as it is"
        halted = {job.processes[1].pid} if way == "stop" else set()
        assert of_job(job.folder) == halted, "nothing else is left running"
    # What other tests share at this time goes again.
    until = time.monotonic() + 10.0
    while set(os.listdir("/dev/shm")) - shared and time.monotonic() < until:
        time.sleep(0.05)
    assert set(os.listdir("/dev/shm")) <= shared
    return results


def of_job(folder: Path) -> set[int]:
    """Processes that were started for the job and still live."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue
            if f"JOB_FOLDER={folder}\0".encode() in environment:
                found.add(int(name))
    return found


def line_of(result: Result) -> str:
    """The one line that zeroxide printed, which is all that a rank says that only hears of a loss."""
    lines = [line for line in result.err.splitlines() if line.startswith(NAMED)]
    assert len(lines) == 1, result.err
    assert result.code in (1, 75), result
    assert "15 s" not in result.out
    return lines[0]


PLACES = {"forward": "computing forward", "backward": "computing backward", "step": "computing outside of any step"}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("phase", "transport"),
    [
        ("forward", "collective"),
        ("backward", "shared_memory"),
        ("step", "shared_memory"),
        pytest.param("forward", "shared_memory", marks=SLOW),
        pytest.param("backward", "collective", marks=SLOW),
        pytest.param("step", "collective", marks=SLOW),
    ],
)
def test_a_killed_rank_is_named_with_what_each_was_doing(phase, transport):
    results = lose(config(transport), phase, "kill")
    assert results[1].code == -9
    for rank in (0, 2):
        line = line_of(results[rank])
        assert "rank 1 was killed or ended without a word" in line
        assert PLACES[phase] in line
        assert "waiting for" in line, "what the others were doing"
        assert "step 1" in results[rank].out
        if phase == "backward" and transport == "shared_memory":
            assert "blames [1] in the core" in results[rank].out


@pytest.mark.parametrize(
    ("phase", "transport", "timeout"),
    [
        ("backward", "collective", {"rank_timeout": 2}),
        pytest.param("forward", "shared_memory", {"rank_timeout": 2}, marks=SLOW),
        pytest.param("forward", "collective", {"rank_timeout": 2}, marks=SLOW),
        pytest.param("step", "collective", {"rank_timeout": 2}, marks=SLOW),
        # What users get.
        ("step", "shared_memory", {}),
    ],
)
def test_a_stopped_rank_is_named_with_what_each_was_doing(phase, transport, timeout):
    results = lose(config(transport, **timeout), phase, "stop")
    for rank in (0, 2):
        line = line_of(results[rank])
        assert "rank 1 is stopped (a signal or a debugger halts it)" in line
        assert PLACES[phase] in line
        assert "waiting for" in line


@pytest.mark.parametrize(
    ("phase", "transport"),
    [
        ("backward", "shared_memory"),
        pytest.param("forward", "collective", marks=SLOW),
        pytest.param("forward", "shared_memory", marks=SLOW),
        pytest.param("backward", "collective", marks=SLOW),
    ],
)
def test_an_exception_on_one_rank_is_quoted_by_the_others(phase, transport):
    results = lose(config(transport), phase, "raise")
    assert results[1].code == 1
    assert "ValueError: labels are out of range" in results[1].err
    for rank in (0, 2):
        line = line_of(results[rank])
        assert f"rank 1 failed while {PLACES[phase]}: ValueError: labels are out of range" in line


@pytest.mark.parametrize("transport", ["shared_memory", pytest.param("collective", marks=SLOW)])
def test_a_rank_that_finishes_before_the_others_is_named(transport):
    results = lose(config(transport, rank_timeout=2), "step", "leave", world=2)
    assert results[1].code == 0
    line = line_of(results[0])
    assert "rank 1 finished, and the others have waited for" in line
    assert "give every rank the same number of batches" in line


def test_scratch_of_a_killed_rank_goes_with_the_next_run(tmp_path):
    """A killed rank leaves its part of the state on disk; whoever trains there next removes it."""
    results = lose(config("shared_memory", tmp_path), "backward", "kill", world=2)
    assert "rank 1 was killed" in line_of(results[0])
    left = sorted(tmp_path.iterdir())
    assert left, "nobody could remove it"
    stranger = tmp_path / "not-of-zeroxide"
    stranger.mkdir()
    source = """
    import json
    from pathlib import Path
    sys.path.insert(0, HERE)
    from families import build
    import zeroxide
    engine, *_ = zeroxide.initialize(model=build("gpt"), config=json.loads(CONFIG))
    say([path.name for path in Path(FOLDER).iterdir()])
    engine.destroy()
    """
    text = source.replace("HERE", repr(str(HERE))).replace("FOLDER", repr(str(tmp_path)))
    (result,) = run_ranks(1, text.replace("CONFIG", repr(json.dumps(config("auto", tmp_path)))), fresh=True)
    assert result.code == 0, result.err
    assert not any(path.name in result.out for path in left), "the dead rank's bytes are free before new ones are taken"
    assert list(tmp_path.iterdir()) == [stranger]


@pytest.mark.parametrize("what", ["one more", "others", "others, evaluating"])
def test_ranks_that_skip_modules_where_gathering_is_a_collective_end_with_an_error(what):
    """All ranks must take part in a gather. Messages have their unit's tag: units of one size do not meet either."""
    for rank, result in enumerate(run_ranks(2, HERE / "skipping.py", [what], fresh=True)):
        assert result.code in (1, 75), result
        assert "ranks have waited for different things" in result.err, f"rank {rank}: {result.err}"
        if what != "one more":
            assert "of unit h.0" in result.err
            assert "of unit h.1" in result.err
        assert "step 0" not in result.out, "no mixed weights or gradients were used"
