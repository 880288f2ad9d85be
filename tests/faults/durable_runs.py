"""Durable runs that are killed, at any instant, and started again until they end."""

from __future__ import annotations

import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from launching import Job

PROGRAM = Path(__file__).with_name("durable_program.py")
STEPS = 12


@dataclass(frozen=True)
class Run:
    """What is run. `weights` and `state`: their homes."""

    every: int
    weights: str
    state: str
    dtype: str
    world: int = 1

    def start(self, folder: Path) -> Job:
        args = [str(folder), str(STEPS), str(self.every), self.weights, self.state, self.dtype]
        return Job(self.world, PROGRAM, args, timeout=120.0)


def ended(job: Job) -> list[str]:
    """The digests of all ranks of a job that must end well."""
    results = job.wait()
    for result in results:
        assert result.code == 0, result.err
    return [result.out.rpartition("done ")[2].strip() for result in results]


def undisturbed(run: Run, folder: Path) -> tuple[list[str], float]:
    """What it comes to when nobody kills it, and the seconds that its loop takes."""
    with run.start(folder) as job:
        for rank in range(run.world):
            job.until(rank, "ready")
        start = time.monotonic()
        found = ended(job)
        seconds = time.monotonic() - start
    shutil.rmtree(folder)
    return found, seconds


def killed_until_done(
    run: Run, folder: Path, kills: int, chance: random.Random, seconds: float
) -> tuple[int, list[str]]:
    """Kills it up to so many times, each after a part of `seconds`, and lets it end; how often it was killed before,
    and what it has come to. One rank is killed, or all at once."""
    made = 0
    while True:
        with run.start(folder) as job:
            if made >= kills:
                return made, ended(job)
            for rank in range(run.world):
                job.until(rank, "ready")
            time.sleep(chance.random() * seconds)
            if all("done" in job.out(rank) for rank in range(run.world)):
                return made, ended(job)
            victims = list(range(run.world)) if chance.random() < 0.5 else [chance.randrange(run.world)]
            for rank in victims:
                job.kill(rank)
            # The others notice, and end.
            for result in job.wait():
                assert result.code != 0 or "done" in result.out, result.err
            made += 1
