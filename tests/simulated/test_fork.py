"""Processes that fork: before the first use of the device all goes well, afterwards a child is refused."""

from __future__ import annotations

from simulated.programs import run

FORK = """
import os, signal
used = sys.argv[1] == "used"
if used:
    there = torch.ones(1000, device="sim")
    torch.empty(1000, device="sim").copy_(torch.ones(1000).pin_memory(), non_blocking=True)
    torch.accelerator.synchronize()
threads = len(os.listdir("/proc/self/task"))
child = os.fork()
if child == 0:
    signal.alarm(60)
    print(torch.sim._is_in_bad_fork(), flush=True)
    for use in (
        lambda: torch.ones(1, device="sim"), lambda: torch.ones(1).pin_memory(), torch.accelerator.synchronize,
        lambda: torch.Stream("sim"), lambda: torch.Event("sim").record(), lambda: torch.sim.races(),
        *[lambda: there + 1, lambda: there.cpu()] * used,
    ):
        try:
            use()
            print("went well", flush=True)
        except RuntimeError as error:
            print(error, flush=True)
    if used:
        del there
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
if used:
    assert there.cpu().equal(torch.ones(1000))
print("threads", threads, flush=True)
"""

REFUSED = (
    "the simulated device was in use when this process was forked: a child cannot use it; "
    "fork before its first use, or start a new process"
)


def test_a_process_that_has_it_loaded_can_fork():
    ended = run(FORK, "unused")
    assert ended.stdout.splitlines() == ["False", *["went well"] * 6, "threads 1"], ended.stderr


def test_a_child_of_a_process_that_has_used_it_is_refused():
    ended = run(FORK, "used")
    assert ended.stdout.splitlines() == ["True", *[REFUSED] * 8, "threads 2"], ended.stderr


THREADS = """
import os
def threads(): return len(os.listdir("/proc/self/task"))
def use():
    there = torch.empty(1000, device="sim")
    there.copy_(torch.ones(1000).pin_memory(), non_blocking=True)
    with torch.Stream("sim"):
        kept = torch.empty(1000, device="sim")
        kept.copy_(torch.ones(1000).pin_memory(), non_blocking=True)
    torch.accelerator.synchronize()
    assert there.cpu().equal(torch.ones(1000)) and kept.cpu().equal(torch.ones(1000))
before = threads()
use()
during = threads()
torch.sim.stop_threads()
after = threads()
use()
print(before, during, after, threads(), torch.sim.races())
"""


def test_threads_end_when_they_are_told_to():
    ended = run(THREADS)
    assert ended.stdout.split() == ["1", "3", "1", "3", "[]"], ended.stderr
