"""When the watch decides that the job cannot go on, with time told by the test."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from zeroxide.distributed.health.activity import Activity, as_doing, describe, summary
from zeroxide.distributed.health.failure_detector import FailureDetector, Member
from zeroxide.distributed.host import Process, host_identity

TIMEOUT = 10.0
SETTLE = 0.5
AWAY = ["elsewhere"]
FORWARD = ("forward", "h.0", None, None)


def waits(seconds, collective="all-gather", unit="h.0", sequence=7, phase="forward"):
    return Activity((phase, unit, collective, sequence), seconds)


def make(world=3, own=0, process=None, host=AWAY):
    """Every rank lives on another host, so that only what is heard counts, unless `host` says so."""
    members = [Member(rank, host, process or Process(100 + rank, None)) for rank in range(world)]
    members[own] = Member(own, host_identity(), Process.current())
    return FailureDetector(members, own, TIMEOUT, SETTLE)


def live(detector, seconds, *activities):
    """`seconds` pass, with a beat of every rank each second; the first failure."""
    for _ in range(seconds):
        for rank, activity in enumerate(activities):
            if activity is not None:
                detector.heard(rank, activity)
        failure = detector.pass_time(1.0)
        if failure is not None:
            return failure
    return None


def test_ranks_that_compute_are_left_alone():
    assert live(make(), 1000, *[Activity(FORWARD, 999.0)] * 3) is None


def test_a_silent_rank_is_named_after_the_timeout_and_not_before():
    detector = make()
    beats = [Activity(FORWARD), waits(1.0), None]
    assert live(detector, 10, *beats) is None
    failure = live(detector, 1, *beats)
    assert failure.ranks == (2,)
    assert "rank 2 does not answer" in failure.line
    assert (
        "rank 0 computing forward of unit h.0, rank 1 waiting for all-gather 7 of unit h.0 in forward" in failure.line
    )


def test_a_rank_whose_connection_closed_is_named_at_once():
    detector = make()
    detector.heard(1, waits(2.0, "reduce", "h.9", 31, "backward"))
    detector.gone(1)
    failure = detector.pass_time(0.0)
    assert failure.ranks == (1,)
    assert "rank 1 was killed" in failure.line
    assert "waiting for reduce 31 of unit h.9 in backward" in failure.line


def test_a_rank_that_finished_may_close_its_connection():
    detector = make()
    detector.finished(1)
    detector.gone(1)
    assert live(detector, 100, Activity(FORWARD), None, Activity(FORWARD)) is None


def test_a_ranks_own_words_wait_for_a_deeper_reason():
    detector = make()
    detector.failed(2, "RuntimeError: connection closed by peer")
    assert detector.pass_time(0.25) is None
    detector.gone(1)
    assert detector.pass_time(0.1).ranks == (1,)


def test_a_ranks_own_words_are_quoted():
    detector = make()
    detector.heard(2, Activity(FORWARD))
    detector.failed(2, "ValueError: labels are out of range")
    detector.gone(2)
    assert detector.pass_time(0.25) is None
    failure = detector.pass_time(0.25)
    assert failure.ranks == (2,)
    assert "rank 2 failed while computing forward of unit h.0: ValueError: labels are out of range" in failure.line


def test_rank_0s_own_words_are_quoted_too():
    detector = make()
    detector.failed(0, "ValueError: here")
    assert detector.pass_time(SETTLE).ranks == (0,)


def test_ranks_that_wait_for_different_things_are_all_named():
    detector = make()
    beats = [waits(10.5), waits(10.5, "reduce-scatter", "h.1", 8, "backward"), waits(10.5)]
    failure = live(detector, 1, *beats)
    assert failure.ranks == (0, 1, 2)
    assert "ranks 0, 2 waiting for all-gather 7 of unit h.0 in forward" in failure.line
    assert "rank 1 waiting for reduce-scatter 8 of unit h.1 in backward" in failure.line


@pytest.mark.parametrize("other", [waits(10.5, sequence=8), waits(10.5, "barrier"), waits(10.5, unit="h.1")])
def test_one_difference_is_enough(other):
    assert live(make(2), 1, waits(10.5), other) is not None


@pytest.mark.parametrize(
    "others",
    [
        [waits(10.5), waits(10.5)],  # the same, however long: a slow transfer
        [waits(10.5, phase="backward"), waits(10.5)],  # a phase is a label, not a collective
        [waits(9.5, sequence=8), waits(10.5)],  # not yet
        [Activity(FORWARD, 99.0), waits(10.5, sequence=8)],  # somebody computes and may still come
    ],
)
def test_waiting_alone_is_no_failure(others):
    assert live(make(), 50, waits(10.5), *others) is None


def test_waiting_for_a_rank_that_has_finished_is_a_failure():
    detector = make(2)
    detector.finished(1)
    assert live(detector, 11, waits(9.0)) is None
    failure = live(detector, 1, waits(10.5))
    assert failure.ranks == (1,)
    assert "rank 1 finished, and the others have waited for 10.5 s" in failure.line


def test_a_rank_that_finishes_late_leaves_the_others_time_to_notice():
    detector = make(2)
    assert live(detector, 50, waits(50.0), Activity(FORWARD)) is None
    detector.finished(1)
    assert live(detector, 10, waits(60.0)) is None
    assert live(detector, 1, waits(61.0)) is not None


def test_other_ranks_judge_rank_0_alone():
    detector = make(3, own=2)
    assert live(detector, 20, waits(99.0, sequence=1), None, waits(99.0, sequence=2)) is None
    detector.told = "rank 1 waiting for barrier 3"
    detector.gone(0)
    failure = detector.pass_time(0.0)
    assert failure.ranks == (0,)
    assert "rank 2 waiting for all-gather 2 of unit h.0 in forward; shortly before: rank 1 waiting" in failure.line


# What the system says of processes of the same host ---------------------------------------------------------------


def child(source):
    # Nobody writes to it: what the tests themselves read from may be at its end.
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    with open(f"/proc/{process.pid}/stat") as file:
        return process, Process(process.pid, int(file.read().rpartition(")")[2].split()[19]))


def test_a_process_that_is_gone_need_not_be_waited_for():
    process, identity = child("print(1, flush=True); input()")
    detector = make(2, process=identity, host=host_identity())
    detector.look()
    assert detector.pass_time(0.0) is None
    process.kill()
    process.wait()
    detector.look()
    failure = detector.pass_time(0.0)
    assert "was killed" in failure.line
    assert f"process {process.pid}" in failure.line
    process.stdout.close()
    process.stdin.close()


def test_a_pid_that_was_given_to_another_process_is_gone():
    own = Process.current()
    assert own.look()[0] == "running"
    assert Process(own.pid, own.started + 1).look()[0] == "gone"


def test_a_zombie_is_gone():
    process, identity = child("print(1, flush=True)")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert identity.look()[0] == "gone"
    process.wait()
    process.stdout.close()
    process.stdin.close()


def test_a_silent_process_that_computes_is_left_alone(monkeypatch):
    """Python's lock may be held by one long call. Processor time here is told by the test."""
    ticks = [0]
    per_second = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(Process, "look", lambda self: ("running", ticks[0]))
    detector = make(2, host=host_identity())
    for _ in range(100):
        detector.look()
        ticks[0] += per_second // 2
        assert detector.pass_time(1.0) is None
    for _ in range(9):
        detector.look()
        assert detector.pass_time(1.0) is None
    failure = live(detector, 12)
    assert "rank 1 does not answer" in failure.line


# Words --------------------------------------------------------------------------------------------------------------


def test_activities_in_words():
    assert describe((None, None, None, None)) == "computing outside of any step"
    assert describe(("backward", 3, None, None)) == "computing backward of unit 3"
    assert describe((None, None, "barrier", 4)) == "waiting for barrier 4"
    assert summary([(0, "a"), (1, "b"), (2, "a")]) == "ranks 0, 2 a, rank 1 b"
    many = summary([(rank, str(rank)) for rank in range(100)])
    assert many.endswith("rank 3 3, and 96 more ranks elsewhere")


@pytest.mark.parametrize("values", [[], [1, 2, 3], [None, None, None, "7"]])
def test_what_is_no_activity_is_refused(values):
    with pytest.raises(ValueError, match="not an activity"):
        as_doing(values)
