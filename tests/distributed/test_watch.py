"""Ranks that are lost are named by the others: processes that are really killed, stopped and led astray.

The watches use short timeouts here, but for one test that uses what users get. What a test claims about time it
shows by order: a rank ends before something that would come much later.
"""

from __future__ import annotations

import re

import pytest
from launching import Job, run_ranks

QUICK = """
import threading
import torch.distributed as dist
from zeroxide.errors import RanksError
from zeroxide.ranks import Watch

watch = Watch(ranks, timeout=1.5, interval=0.2, grace=0.5, cleanup=20.0)
ranks.barrier()

def wait_for_others(unit="h.1", collective="all-gather"):
    with watch.waiting(collective, unit):
        ranks.barrier()
"""

FORWARD = """
watch.doing = ("forward", "h.1", None, None)
say("ready")
if ranks.rank == VICTIM:
    time.sleep(60)
wait_for_others()
"""


def line_of(result) -> str:
    """The one line that zeroxide printed."""
    (line,) = [each for each in result.err.splitlines() if "zeroxide: error:" in each]
    return line


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(victim):
    """Also when it is the rank that the others report to."""
    with Job(3, QUICK + FORWARD.replace("VICTIM", str(victim))) as job:
        for rank in range(3):
            job.until(rank, "ready")
        job.kill(victim)
        results = job.wait()
    assert results[victim].code == -9
    for rank in {0, 1, 2} - {victim}:
        # gloo notices as well, so the main thread leaves its wait and the error reaches the top.
        assert results[rank].code in (1, 75)
        line = line_of(results[rank])
        assert f"rank {victim} was killed or ended without a word: process {job.processes[victim].pid} on " in line
        assert "computing forward of unit h.1" in line
        assert re.search(r"waiting for all-gather 1 of unit h\.1 in forward", line)
        assert "Traceback" not in results[rank].err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_ends_when_it_goes_on(victim):
    with Job(2, QUICK + FORWARD.replace("VICTIM", str(victim))) as job:
        for rank in range(2):
            job.until(rank, "ready")
        job.stop(victim)
        other = 1 - victim
        result = job.wait([other])[other]
        # Nobody wakes the main thread from gloo, so the watch ends the process.
        assert result.code == 75
        assert f"rank {victim} is stopped" in line_of(result)
        assert f"rank {other} waiting for all-gather 1 of unit h.1 in forward" in line_of(result)
        job.go_on(victim)
        # It slept for a minute in its own code: it is not the end of that sleep that ends it.
        assert job.wait()[victim].code == 75


def test_with_the_defaults_a_stopped_rank_is_named_before_15_seconds():
    """The witness counts to 15 s from the moment after the stop, on the same clock as everybody."""
    source = """
from zeroxide.ranks import Watch
watch = Watch(ranks)
say("ready")
if ranks.rank == 1:
    time.sleep(60)
until = time.monotonic() + 14.5
def late():
    time.sleep(max(0.0, until - time.monotonic()))
    say("late")
import threading
os.kill(int(ranks.gather_objects(os.getpid())[1]), 19) if False else None
"""
    source = """
import signal, threading
from zeroxide.ranks import Watch
watch = Watch(ranks)
pids = ranks.gather_objects(os.getpid())
ranks.barrier()
if ranks.rank == 1:
    time.sleep(60)
os.kill(pids[1], signal.SIGSTOP)
threading.Thread(target=lambda: (time.sleep(15.0), say("15 s")), daemon=True).start()
with watch.waiting("all-gather", "h.1"):
    ranks.barrier()
"""
    with Job(2, source) as job:
        result = job.wait([0])[0]
    assert result.code == 75
    assert "rank 1 is stopped" in line_of(result)
    assert result.out == ""


def test_a_rank_that_leaves_without_a_word_is_named():
    results = run_ranks(2, QUICK + "os._exit(0) if ranks.rank == 1 else wait_for_others()")
    assert results[1].code == 0
    assert results[0].code in (1, 75)
    assert "rank 1 was killed or ended without a word" in line_of(results[0])


RAISING = """
watch.doing = ("backward", "h.7", None, None)
if ranks.rank == VICTIM:
    raise ValueError("labels are out of range\\nsee above")
wait_for_others()
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_is_quoted(victim):
    results = run_ranks(3, QUICK + RAISING.replace("VICTIM", str(victim)))
    assert results[victim].code == 1
    assert "ValueError: labels are out of range" in results[victim].err
    assert "zeroxide: error" not in results[victim].err
    expected = f"rank {victim} failed while computing backward of unit h.7: ValueError: labels are out of range"
    for rank in {0, 1, 2} - {victim}:
        assert results[rank].code in (1, 75)
        assert expected in line_of(results[rank])


def test_ranks_that_wait_for_different_things_end_with_what_each_waits_for():
    """Both wait in gloo, where nobody can wake them."""
    source = """
watch.doing = ("forward", None, None, None)
if ranks.rank == 0:
    with watch.waiting("all-gather", "h.1"):
        dist.recv(torch.zeros(1), 1)
with watch.waiting("reduce-scatter", "h.2"):
    dist.recv(torch.zeros(1), 0)
"""
    for result in run_ranks(2, QUICK + source):
        assert result.code == 75
        line = line_of(result)
        assert "ranks have waited for different things" in line
        assert "rank 0 waiting for all-gather 1 of unit h.1 in forward" in line
        assert "rank 1 waiting for reduce-scatter 1 of unit h.2 in forward" in line


def test_a_rank_that_computes_for_long_is_left_alone_also_when_no_other_thread_runs():
    """First with the other threads running, then with Python's lock held; each several times the timeout."""
    source = """
import ctypes
if ranks.rank == 1:
    time.sleep(4.0)
    # A call through PyDLL keeps Python's lock: here sorting with C's qsort, which computes all the while.
    libc = ctypes.PyDLL(None)
    block = ctypes.create_string_buffer(1 << 22)
    until = time.monotonic() + 5.0
    sys.setswitchinterval(3600)
    while time.monotonic() < until:
        libc.memset(block, 1, 1 << 22)
    sys.setswitchinterval(0.005)
wait_for_others()
watch.check()
watch.close()
ranks.close()
say("done")
"""
    for result in run_ranks(2, QUICK + source):
        assert (result.code, result.out) == (0, "done\n"), result.err


def test_the_end_is_clean():
    """No thread, socket or group stays; a rank that has finished may be survived by others, whichever it is."""
    source = """
import os, threading
def sockets():
    return sum(os.readlink(f"/proc/self/fd/{each}").startswith("socket:") for each in os.listdir("/proc/self/fd")
               if os.path.exists(f"/proc/self/fd/{each}") or os.path.islink(f"/proc/self/fd/{each}"))
hook = sys.excepthook
with_watch = sockets()
assert "zeroxide-watch" in [each.name for each in threading.enumerate()]
if ranks.rank == 1:
    time.sleep(2.5)
watch.check()
watch.close()
watch.close()
assert "zeroxide-watch" not in [each.name for each in threading.enumerate()]
assert sys.excepthook is not hook
assert sockets() <= with_watch - 3, (sockets(), with_watch)
assert len(os.listdir("/proc/self/task")) >= 1
say("closed")
time.sleep(2.5 if ranks.rank == 0 else 0.0)
say("done")
"""
    for result in run_ranks(3, QUICK + source):
        assert (result.code, result.out, result.err) == (0, "closed\ndone\n", ""), result.err


def test_what_happens_in_the_main_thread():
    """Callbacks hear the line, `check` and `waiting` raise it, and a program that closes the watch may go on."""
    source = """
if ranks.rank == 1:
    watch.failed("the disk\\n is full")
    watch.close()
    say("rank 1 goes its way")
    os._exit(3)
heard = []
event = threading.Event()
watch.on_failure(lambda line: heard.append(line))
watch.on_failure(lambda line: 1 / 0)
watch.on_failure(lambda line: event.set())
assert event.wait(30)
try:
    watch.check()
    say("not raised")
except RanksError as error:
    assert [str(error)] == heard, heard
    assert error.ranks == (1,)
    say(error)
for attempt in range(2):
    try:
        with watch.waiting("all-gather"):
            say("entered")
    except RanksError as error:
        assert [str(error)] == heard
late = []
watch.on_failure(late.append)
assert late == heard
assert ranks.lost == heard[0]
try:
    ranks.barrier()
except RanksError as error:
    assert [str(error)] == heard
watch.close()
ranks.close()
time.sleep(1.5)
say("goes on")
"""
    results = run_ranks(2, QUICK + source)
    assert results[1].code == 3
    assert results[0].code == 0, results[0].err
    line, last = results[0].out.splitlines()
    assert line.startswith("rank 1 failed while computing outside of any step: the disk is full")
    assert last == "goes on"


def test_waiting_for_a_rank_that_has_finished_ends():
    """A rank with fewer batches: its program ends well, and the others would wait for good."""
    source = """
if ranks.rank == 1:
    watch.close()
    time.sleep(8)
    os._exit(0)
with watch.waiting("all-gather", "h.1"):
    time.sleep(60)
"""
    result = run_ranks(2, QUICK + source)[0]
    assert result.code == 75
    assert "rank 1 finished, and the others have waited for" in line_of(result)
    assert "give every rank the same number of batches" in line_of(result)


def test_a_forked_child_neither_keeps_the_connection_nor_speaks_for_its_parent():
    """As a data loader's workers are: they live on for a while when their parent is killed."""
    source = """
if ranks.rank == 1:
    child = os.fork()
    if child == 0:
        watch.check()
        watch.failed("not mine to say")
        watch.close()
        time.sleep(20)
        os._exit(0)
    say(child)
    time.sleep(60)
say("ready")
wait_for_others()
"""
    import os
    import signal

    with Job(2, QUICK + source) as job:
        job.until(0, "ready")
        job.until(1, "\n")
        child = int(job.out(1))
        job.kill(1)
        results = job.wait()
        os.kill(child, signal.SIGKILL)
    assert "rank 1 was killed or ended without a word" in line_of(results[0])
