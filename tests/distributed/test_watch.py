"""Ranks that are lost are named by the others: processes that are really killed, stopped and led astray.

The watches use short timeouts here, but for one test that uses what users get. What a test claims about time it
shows by order: a rank ends before something that would come much later.
"""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from launching import LIGHT, PREAMBLE, Job, run_ranks

from zeroxide.distributed import Ranks, Watch
from zeroxide.distributed.health.activity import Failure
from zeroxide.errors import RanksError

QUICK = """
import threading
from zeroxide.errors import RanksError
from zeroxide.distributed import Watch

watch = Watch(ranks, timeout=1.5, interval=0.2, grace=0.5, cleanup=20.0)
ranks.barrier()

def wait_for_others():
    with watch.waiting("all-gather", "h.1"):
        ranks.barrier()

def heard(rank, phase):
    # Until what this rank knows of another is not older than the test wants.
    member = watch._endpoint._detector.members[rank]
    while member.activity.doing[0] != phase:
        time.sleep(0.01)
"""

FORWARD = """
watch.doing = ("forward", "h.1", None, None)
if ranks.rank == VICTIM:
    time.sleep(60)
if 0 in (ranks.rank, VICTIM):
    heard(VICTIM, "forward")
say("ready")
wait_for_others()
"""


# 75 where the main thread waits for good, 1 where it is told: it may hear of the failure before it waits.
ENDED = (1, 75)


def line_of(result) -> str:
    """The one line that zeroxide printed."""
    (line,) = [each for each in result.err.splitlines() if "zeroxide: error:" in each]
    return line


def run_light(world, source):
    return run_ranks(world, QUICK + source, preamble=LIGHT)


@pytest.mark.parametrize(
    ("victim", "world", "preamble"),
    [
        pytest.param(0, 3, LIGHT, id="the rank that the others report to"),
        pytest.param(1, 3, LIGHT, id="another rank"),
        pytest.param(1, 2, PREAMBLE, id="another rank, over gloo"),
    ],
)
def test_a_killed_rank_is_named(victim, world, preamble):
    with Job(world, QUICK + FORWARD.replace("VICTIM", str(victim)), preamble=preamble, fresh=True) as job:
        others = sorted(set(range(world)) - {victim})
        for rank in others:
            job.until(rank, "ready")
        job.kill(victim)
        results = job.wait()
    assert results[victim].code == -9
    for rank in others:
        # gloo notices as well: the main thread leaves its wait, and the error reaches the top of the program.
        assert results[rank].code in ENDED
        line = line_of(results[rank])
        assert f"rank {victim} was killed or ended without a word: process {job.processes[victim].pid} on " in line
        assert "it was computing forward of unit h.1" in line
        if victim == 0 or rank == 0:
            assert re.search(r"waiting for all-gather 1 of unit h\.1 in forward", line)
        assert results[rank].err.count("\n") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_ends_when_it_goes_on(victim):
    with Job(2, QUICK + FORWARD.replace("VICTIM", str(victim)), preamble=LIGHT) as job:
        other = 1 - victim
        job.until(other, "ready")
        job.stop(victim)
        result = job.wait([other])[other]
        # Nobody wakes the main thread, so the watch ends the process.
        assert result.code == 75
        assert f"rank {victim} is stopped" in line_of(result)
        assert f"rank {other} waiting for all-gather 1 of unit h.1 in forward" in line_of(result)
        job.go_on(victim)
        # It slept for a minute in its own code: it is not the end of that sleep that ends it.
        assert job.wait()[victim].code == 75


def test_with_the_defaults_a_stopped_rank_is_named_before_15_seconds():
    """A thread of the same process counts to 15 s from the stop, and would say so."""
    source = """
import signal, threading
from zeroxide.distributed import Watch
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
    with Job(2, source, fresh=True) as job:
        result = job.wait([0])[0]
    assert result.code == 75
    assert "rank 1 is stopped" in line_of(result)
    assert result.out == ""


def test_a_rank_that_leaves_without_a_word_is_named():
    results = run_light(2, "os._exit(0) if ranks.rank == 1 else wait_for_others()")
    assert results[1].code == 0
    assert results[0].code in ENDED
    assert "rank 1 was killed or ended without a word" in line_of(results[0])


RAISING = """
watch.doing = ("backward", "h.7", None, None)
if ranks.rank == VICTIM:
    raise ValueError("labels are out of range\\nsee above")
wait_for_others()
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_is_quoted(victim):
    results = run_light(3, RAISING.replace("VICTIM", str(victim)))
    assert results[victim].code == 1
    assert "ValueError: labels are out of range" in results[victim].err
    assert "zeroxide: error" not in results[victim].err
    expected = f"rank {victim} failed while computing backward of unit h.7: ValueError: labels are out of range"
    for rank in {0, 1, 2} - {victim}:
        assert results[rank].code in ENDED
        assert expected in line_of(results[rank])


FAIL_IN = {
    "waiting": """with watch.waiting("all-gather"):
    raise RuntimeError("Connection closed by peer")
""",
    "wait": """def fail(): raise RuntimeError("Connection closed by peer")
watch.wait("all-gather", "h.1", fail)
""",
}


@pytest.mark.parametrize("form", FAIL_IN)
def test_an_error_that_follows_from_a_lost_rank_is_explained(form):
    """What gloo raises when a peer is gone, outside of `waiting` and inside: the deeper reason is what is told."""
    source = """
if ranks.rank == 1:
    os._exit(0)
while os.path.exists(f"/proc/{PIDS[1]}/stat") and " Z " not in open(f"/proc/{PIDS[1]}/stat").read():
    time.sleep(0.001)
if ranks.rank == 0:
    raise RuntimeError("Connection closed by peer")
FAIL
"""
    source = source.replace("FAIL", FAIL_IN[form])
    results = run_light(3, source.replace("if ranks", "PIDS = ranks.gather_objects(os.getpid())\nif ranks", 1))
    for rank in (0, 2):
        assert results[rank].code == 1
        assert "rank 1 was killed or ended without a word" in line_of(results[rank])
    assert "RuntimeError: Connection closed by peer" in results[0].err
    assert "Traceback" not in results[2].err
    assert "Connection closed by peer" not in results[2].err


DIVERGING = """
watch.doing = ("forward", None, None, None)
if ranks.rank == 0:
    with watch.waiting("all-gather", "h.1"):
        WAIT
watch.wait("reduce-scatter", "h.2", lambda: WAIT)
"""


def test_what_is_called_in_a_wait_is_told_counted_and_forgotten():
    """Catches: a wait that nobody hears of, one that does not count, one that lasts for ever after an error."""
    watch = Watch(Ranks())
    watch.doing = before = ("forward", None, None, None)
    with watch.waiting("all-gather", "h.0"):
        assert watch.doing == ("forward", "h.0", "all-gather", 1)
    seen = watch.wait("weights", "h.1", lambda *given: (*given, watch.doing), 4, 5)
    assert seen == (4, 5, ("forward", "h.1", "weights", 2))
    assert watch.doing is before
    with pytest.raises(ZeroDivisionError):
        watch.wait("weights", "h.1", lambda: 1 / 0)
    assert watch.doing is before
    with watch.waiting("all-gather", "h.2"):
        assert watch.doing == ("forward", "h.2", "all-gather", 4)


def test_a_failure_is_raised_before_a_wait_and_after_it():
    """Catches: a wait that begins, or ends well, though it is known that the job has failed."""
    watch, failure = Watch(Ranks()), Failure("rank 1 was killed", (1,))

    def fail():
        watch._failure = failure

    for call in (fail, lambda: pytest.fail("the failure is known")):
        with pytest.raises(RanksError, match="rank 1 was killed") as caught:
            watch.wait("weights", "h.1", call)
        assert caught.value.ranks == (1,)


@pytest.mark.parametrize(
    ("world", "preamble", "wait"),
    [
        pytest.param(3, LIGHT, "time.sleep(60)", id="three ranks"),
        # Nobody can wake a thread that waits in gloo.
        pytest.param(2, PREAMBLE, "torch.distributed.recv(torch.zeros(1), 1 - ranks.rank)", id="in gloo"),
    ],
)
def test_ranks_that_wait_for_different_things_end_with_what_each_waits_for(world, preamble, wait):
    for result in run_ranks(world, QUICK + DIVERGING.replace("WAIT", wait), preamble=preamble, fresh=True):
        assert result.code == 75
        line = line_of(result)
        assert "ranks have waited for different things" in line
        assert "rank 0 waiting for all-gather 1 of unit h.1 in forward" in line
        others = "rank 1" if world == 2 else "ranks 1-2"
        assert f"{others} waiting for reduce-scatter 1 of unit h.2 in forward" in line


def test_a_rank_that_computes_for_long_is_left_alone_also_when_no_other_thread_runs():
    """First with the other threads running, then with Python's lock held; each several times the timeout."""
    source = """
import ctypes
if ranks.rank == 1:
    time.sleep(4.0)
    # A call through PyDLL keeps Python's lock, and with a long interval the loop keeps it between the calls.
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
    for result in run_light(2, source):
        assert (result.code, result.out) == (0, "done\n"), result.err


def test_the_end_is_clean():
    """No thread, socket or hook stays. A rank that has finished may be survived by the others, also rank 0."""
    source = """
def sockets():
    links = []
    for each in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{each}"))
        except FileNotFoundError:
            pass
    return sum("socket:" in each or "eventpoll" in each for each in links)

def threads():
    return [each.name for each in threading.enumerate()]

hook = sys.excepthook
assert sockets() > 0 and "zeroxide-watch" in threads()
if ranks.rank == 1:
    time.sleep(2.5)
watch.check()
watch.close()
watch.close()
assert threads() == ["MainThread"], threads()
assert sys.excepthook is not hook
assert sockets() == 0
while len(os.listdir("/proc/self/task")) > 1:  # a thread that was joined leaves a moment later
    time.sleep(0.01)
say("closed")
time.sleep(2.5 if ranks.rank == 0 else 0.0)
say("done")
"""
    for result in run_light(3, source):
        assert (result.code, result.out, result.err) == (0, "closed\ndone\n", ""), result.err


def test_a_program_that_just_ends_has_finished():
    """Nobody calls `close` in a script that ends; the ranks that end later must not take it for a death."""
    for result in run_light(2, "time.sleep(2.5 * ranks.rank)\nwatch.check()\nsay('done')"):
        assert (result.code, result.out, result.err) == (0, "done\n", "")


def test_what_happens_in_the_main_thread():
    """Callbacks hear the line, `check` and `waiting` raise it, and a program that closes the watch may go on."""
    source = """
if ranks.rank == 1:
    watch.failed("the disk\\n is full")
    watch.close()
    os._exit(3)
heard = []
event = threading.Event()
watch.on_failure(lambda *failure: heard.append(failure))
watch.on_failure(lambda *_: 1 / 0)
watch.on_failure(lambda *_: event.set())
assert event.wait(30)
try:
    watch.check()
    say("not raised")
except RanksError as error:
    assert [(str(error), error.ranks)] == heard, heard
    assert error.ranks == (1,)
    say(error)
for attempt in range(2):
    try:
        with watch.waiting("all-gather"):
            say("entered")
    except RanksError as error:
        assert [(str(error), error.ranks)] == heard
late = []
watch.on_failure(lambda *failure: late.append(failure))
assert late == heard
assert ranks.lost == heard[0][0]
assert str(ranks.explain()) == heard[0][0]
# Longer than the grace: a main thread that has been told is not ended.
time.sleep(1.5)
watch.close()
say("goes on")
"""
    results = run_light(2, source)
    assert results[1].code == 3
    assert results[0].code == 0, results[0].err
    line, last = results[0].out.splitlines()
    assert line.startswith("rank 1 failed while computing outside of any step: the disk is full")
    assert last == "goes on"


def test_a_program_that_is_told_and_neither_ends_nor_closes_is_ended():
    source = """
watch._cleanup = 1.0
if ranks.rank == 1:
    os._exit(0)
try:
    while True:
        time.sleep(0.05)
        watch.check()
except RanksError:
    say("told")
    time.sleep(60)
"""
    result = run_light(2, source)[0]
    assert (result.code, result.out) == (75, "told\n")
    assert "rank 1 was killed" in line_of(result)


def test_waiting_for_a_rank_that_has_finished_ends():
    """A rank with fewer batches: its program ends well, and the others would wait for good."""
    source = """
if ranks.rank == FINISHED:
    watch.close()
    os._exit(0)
with watch.waiting("all-gather", "h.1"):
    time.sleep(60)
"""
    for finished in (0, 1):
        result = run_light(2, source.replace("FINISHED", str(finished)))[1 - finished]
        assert result.code == 75
        assert f"rank {finished} finished, and the others have waited for" in line_of(result)
        assert "give every rank the same number of batches" in line_of(result)


def test_a_forked_child_neither_keeps_the_connection_nor_speaks_for_its_parent():
    """As a data loader's workers are: they live on for a while when their parent is killed."""
    source = """
if ranks.rank == 1:
    # What the system says of the process would be enough otherwise.
    child = os.fork()
    if child == 0:
        watch.check()
        watch.failed("not mine to say")
        watch.close()
        time.sleep(60)
        os._exit(0)
    say(child)
    time.sleep(60)
watch._endpoint._detector.look = lambda: None
say("ready")
with watch.waiting("all-gather"):
    time.sleep(60)
"""
    with Job(2, QUICK + source, preamble=LIGHT) as job:
        job.until(0, "ready")
        job.until(1, "\n")
        child = int(job.out(1))
        job.kill(1)
        result = job.wait()[0]
        os.kill(child, signal.SIGKILL)
    assert result.code == 75
    assert "rank 1 was killed or ended without a word" in line_of(result)


def test_a_job_that_was_halted_as_a_whole_goes_on():
    """As when a terminal or a batch system suspends it: time in which nobody listens is nobody's silence."""
    source = """
watch.doing = ("forward", None, None, None)
heard(1 - ranks.rank, "forward")
say("ready")
until = time.monotonic() + 5.0
while time.monotonic() < until:
    time.sleep(0.01)
    watch.check()
watch.close()
say("done")
"""
    with Job(2, QUICK + source, preamble=LIGHT) as job:
        for rank in range(2):
            job.until(rank, "ready")
        for rank in range(2):
            job.stop(rank)
        time.sleep(3.0)
        for rank in range(2):
            job.go_on(rank)
        for result in job.wait():
            assert (result.code, result.out) == (0, "ready\ndone\n"), result.err


def test_a_stranger_at_the_port_is_turned_away():
    source = """
import socket
if ranks.rank == 0:
    port = watch._endpoint._listener.getsockname()[1]
    guess = b'{"rank": 1, "token": "guess"}\\n{"failed": "x"}\\n'
    for words in (b"GET / HTTP/1.0\\r\\n\\r\\n", guess, b"7\\n", b"x" * 100000):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.settimeout(30)
            try:
                stranger.sendall(words)
                assert stranger.recv(1) == b""
            except ConnectionResetError:
                pass
    while len(watch._endpoint._visitors) > 1:
        time.sleep(0.01)
time.sleep(1.0)
wait_for_others()
watch.close()
say("done")
"""
    for result in run_light(2, source):
        assert (result.code, result.out) == (0, "done\n"), result.err
