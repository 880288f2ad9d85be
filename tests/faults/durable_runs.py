"""Durable runs that are killed, at any instant, and started again until they end."""

from __future__ import annotations

import random
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from launching import Job

PROGRAM = Path(__file__).with_name("durable_program.py")
STEPS = 12
SAVE_SECONDS = 0.1
"""A save in the background of so small a model takes some hundredths of a second."""


@dataclass(frozen=True)
class Run:
    """What is run. `weights` and `state`: their homes; `gradients`: where they wait for the step."""

    every: int
    weights: str
    state: str
    dtype: str
    gradients: str = "auto"
    world: int = 1

    def start(self, folder: Path, *more: str) -> Job:
        args = [str(folder), str(STEPS), str(self.every), self.weights, self.state, self.dtype, self.gradients, *more]
        return Job(self.world, PROGRAM, args, timeout=120.0)


@dataclass(frozen=True)
class Outcome:
    """What a run comes to: the digests of all ranks at its end, and before each save, as `step N is DIGEST`."""

    end: list[str]
    saves: list[set[str]]


def ended(job: Job) -> Outcome:
    """What a job that must end well comes to."""
    results = job.wait()
    for result in results:
        assert result.code == 0, result.err
    return Outcome(
        [result.out.rpartition("done ")[2].strip() for result in results],
        [set(re.findall(r"saves (step \d+ is \w+)", result.out)) for result in results],
    )


def undisturbed(run: Run, folder: Path) -> tuple[Outcome, float]:
    """What it comes to when nobody kills it, and the seconds that its loop takes."""
    with run.start(folder) as job:
        for rank in range(run.world):
            job.until(rank, "ready")
        start = time.monotonic()
        found = ended(job)
        seconds = time.monotonic() - start
    assert all(len(saves) == STEPS // 4 for saves in found.saves)
    shutil.rmtree(folder)
    return found, seconds


def check_the_checkpoint(run: Run, folder: Path, expected: Outcome) -> None:
    """The checkpoint that killed saves left loads, and is what an undisturbed run saves at that step."""
    with run.start(folder / "loads", "--load", str(folder / "checkpoints")) as job:
        results = job.wait()
    shutil.rmtree(folder / "loads")
    for result, saves in zip(results, expected.saves, strict=True):
        assert result.code == 0, result.err
        assert result.out.rpartition("loaded ")[2].strip() in saves, run


def wait_for_a_save(job: Job) -> None:
    """Waits until the first rank has begun a save, or ends without one."""
    while not any(word in job.out(0) for word in ("saves", "done")):
        time.sleep(0.001)


def killed_until_done(
    run: Run, folder: Path, kills: int, chance: random.Random, seconds: float, expected: Outcome
) -> tuple[int, int, Outcome]:
    """Kills it up to so many times, each after a part of `seconds` or in a save, and lets it end.

    Returns how often it was killed before, after how many of these there was a checkpoint, and what it has come to.
    One rank is killed, or all at once.
    """
    made = looked_at = 0
    while True:
        with run.start(folder) as job:
            if made >= kills:
                return made, looked_at, ended(job)
            for rank in range(run.world):
                job.until(rank, "ready")
            if chance.random() < 0.3:
                wait_for_a_save(job)
                time.sleep(chance.random() * SAVE_SECONDS)
            else:
                time.sleep(chance.random() * seconds)
            if all("done" in job.out(rank) for rank in range(run.world)):
                return made, looked_at, ended(job)
            victims = list(range(run.world)) if chance.random() < 0.5 else [chance.randrange(run.world)]
            for rank in victims:
                job.kill(rank)
            # The others notice, and end.
            for result in job.wait():
                assert result.code != 0 or "done" in result.out, result.err
            made += 1
        if (folder / "checkpoints" / "latest").exists():
            check_the_checkpoint(run, folder, expected)
            looked_at += 1
