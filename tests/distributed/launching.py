"""Starts real ranks: separate processes with torchrun's variables, whose ends and words a test can look at.

    results = run_ranks(2, "print(ranks.rank)")
    with Job(3, source) as job:
        job.until(1, "ready")
        job.kill(1)
        results = job.wait()

A source that is a string is run after `PREAMBLE`, which starts the ranks; a path is run as it is. Ranks are forked from
a process that has imported torch (`forking.py`); with `fresh=True` each is a new interpreter, for tests of what a
process is from its start to its end.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forking import ForkedProcess, ForkServer, without_leaks

import zeroxide

PREAMBLE = """
import os, sys, time
import torch
from zeroxide.distributed import start
torch.set_num_threads(1)
ranks = start(timeout_seconds=60)

def say(*words):
    print(*words, flush=True)
"""

LIGHT = """
import json, os, sys, threading, time
from zeroxide.distributed.collectives import Ranks

def say(*words):
    print(*words, flush=True)

class FileRanks(Ranks):
    calls = 0

    def gather_objects(self, value):
        FileRanks.calls += 1
        folder, name = os.environ["JOB_FOLDER"], f"gather.{FileRanks.calls}."
        with open(f"{folder}/{self.rank}.part", "w") as file:
            json.dump(value, file)
        os.rename(f"{folder}/{self.rank}.part", f"{folder}/{name}{self.rank}")
        paths = [f"{folder}/{name}{rank}" for rank in range(self.world)]
        while not all(os.path.exists(path) for path in paths):
            time.sleep(0.01)
        return [json.load(open(path)) for path in paths]

    def barrier(self):
        self.gather_objects(None)

ranks = FileRanks(rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))
"""
"""Instead of `PREAMBLE`: ranks that meet through files, without torch, whose collectives wait for good for a lost rank.
Starting torch takes seconds of processor time; what does not concern its collectives can be tried without it."""

PACKAGE = Path(zeroxide.__file__).parents[1]
TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Result:
    """How one rank ended. `code` is the exit status, negative for a signal; None if it had to be killed at the end."""

    code: int | None
    out: str
    err: str


class Job:
    """The processes of one job. Leaving the context kills those that are left, and waits for them."""

    def __init__(
        self,
        world: int,
        source_or_path: str | Path,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        timeout: float = 120.0,
        preamble: str = PREAMBLE,
        fresh: bool = False,
    ) -> None:
        # What has torch already is not without it.
        fresh = fresh or preamble == LIGHT
        self._until = time.monotonic() + timeout
        self._folder = tempfile.TemporaryDirectory(prefix="zeroxide-ranks-")
        folder = self.folder = Path(self._folder.name)
        if isinstance(source_or_path, Path):
            script = source_or_path
        else:
            script = folder / "rank.py"
            script.write_text(preamble + textwrap.dedent(source_or_path))
        port = str(free_port())
        modules = [str(PACKAGE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.processes: list[subprocess.Popen[bytes] | ForkedProcess] = []
        self._files: list[tuple[Path, Path]] = []
        for rank in range(world):
            variables = {
                **{
                    name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))
                },
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(modules),
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "JOB_FOLDER": str(folder),
                **(env or {}),
            }
            files = folder / f"{rank}.out", folder / f"{rank}.err"
            start = start_rank if fresh else fork_rank
            self.processes.append(start(rank, script, args, variables, *files))
            self._files.append(files)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._folder.cleanup()

    def kill(self, rank: int) -> None:
        """SIGKILL, as the out-of-memory killer sends."""
        self.processes[rank].kill()

    def stop(self, rank: int) -> None:
        """SIGSTOP: the process stays, and does nothing."""
        self.processes[rank].send_signal(signal.SIGSTOP)

    def go_on(self, rank: int) -> None:
        """SIGCONT."""
        self.processes[rank].send_signal(signal.SIGCONT)

    def out(self, rank: int) -> str:
        """What the rank has printed so far."""
        return self._files[rank][0].read_text(errors="replace")

    def err(self, rank: int) -> str:
        """What the rank has written to stderr so far."""
        return without_leaks(self._files[rank][1].read_text(errors="replace"))

    def until(self, rank: int, text: str) -> None:
        """Waits for the rank to print `text`. Fails when it ends, or the time is over, before that."""
        while text not in self.out(rank):
            ended = self.processes[rank].poll() is not None
            assert not (ended and text not in self.out(rank)), f"rank {rank} ended:\n{self.err(rank)}"
            assert time.monotonic() < self._until, f"rank {rank} did not print {text!r}:\n{self.err(rank)}"
            time.sleep(0.02)

    def wait(self, ranks: Sequence[int] | None = None) -> list[Result]:
        """Waits for these ranks (all) to end. Returns the results of all ranks; those still running have no code."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            try:
                self.processes[rank].wait(max(0.0, self._until - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        return [Result(process.poll(), self.out(rank), self.err(rank)) for rank, process in enumerate(self.processes)]


def run_ranks(
    world: int,
    source_or_path: str | Path,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    *,
    preamble: str = PREAMBLE,
    fresh: bool = False,
) -> list[Result]:
    """Runs `world` ranks to their end, or kills them after `timeout` seconds; what became of each."""
    with Job(world, source_or_path, args, env, timeout=timeout, preamble=preamble, fresh=fresh) as job:
        return job.wait()


def start_rank(
    rank: int, script: Path, args: Sequence[str], env: Mapping[str, str], out: Path, err: Path
) -> subprocess.Popen[bytes]:
    """A new interpreter, which is all the same whatever its rank."""
    with out.open("wb") as to_out, err.open("wb") as to_err:
        command = [sys.executable, str(script), *args]
        return subprocess.Popen(command, env=dict(env), stdin=subprocess.DEVNULL, stdout=to_out, stderr=to_err)


_servers: list[ForkServer] = []
"""For ranks of even and of odd number: so neighbours differ, as ranks that are started one by one do, in the hashes of
strings and in where memory lies, and code whose order depends on either still fails."""


def fork_rank(
    rank: int, script: Path, args: Sequence[str], env: Mapping[str, str], out: Path, err: Path
) -> ForkedProcess:
    """A process forked from the server of its rank. The servers start with the first, side by side."""
    if not _servers:
        _servers.extend(ForkServer() for _ in range(2))
    return _servers[rank % 2].fork(script, args, env, out, err)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses, below those that the system gives to outgoing connections."""
    while True:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", random.randrange(12000, 32000)))
            except OSError:
                continue
            return sock.getsockname()[1]
