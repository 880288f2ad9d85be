"""A durable run that is killed at random instants comes to the bits of one that never was."""

from __future__ import annotations

import random
import shutil

import pytest
from durable_runs import Run, killed_until_done, undisturbed

RUNS = [
    Run(1, "nvme", "nvme", "bf16"),
    Run(2, "cpu", "nvme", "bf16"),
    Run(3, "nvme", "cpu", "fp32"),
    Run(1, "cpu", "nvme", "fp16", gradients="disk"),
]
TWO_RANKS = [Run(1, "nvme", "nvme", "bf16", world=2), Run(2, "cpu", "nvme", "fp32", world=2)]


def loop(runs, kills, folder, seed):
    """Kills in turn until there were so many in all, and how many checkpoints were looked at."""
    chance = random.Random(seed)
    known = {}
    made = rounds = looked_at = 0
    while made < kills:
        run = runs[rounds % len(runs)]
        rounds += 1
        assert rounds <= 10 * kills, "runs end before they are killed"
        if run not in known:
            known[run] = undisturbed(run, folder / "undisturbed")
        expected, seconds = known[run]
        here = folder / f"run{rounds}"
        more, checkpoints, found = killed_until_done(run, here, min(6, kills - made), chance, 0.2 * seconds, expected)
        assert found.end == expected.end, run
        made += more
        looked_at += checkpoints
        print(f"{made} kills in {rounds} runs, {looked_at} checkpoints", flush=True)
        shutil.rmtree(here)
    return made, looked_at


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.weights}-{run.state}-{run.dtype}")
def test_a_run_killed_a_few_times_has_the_bits_of_one_that_was_not(tmp_path, run):
    loop([run], 3, tmp_path, seed=run.every)


@pytest.mark.parametrize("run", TWO_RANKS, ids=lambda run: f"{run.weights}-{run.dtype}")
def test_two_ranks_of_which_one_or_both_are_killed_go_on_together(tmp_path, run):
    loop([run], 2, tmp_path, seed=run.every)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_kills(tmp_path):
    made, looked_at = loop(2 * RUNS + TWO_RANKS, 200, tmp_path, seed=200)
    assert made == 200
    # Three kills in ten are made in a save; the first save of a run leaves none if it is killed.
    assert looked_at >= 20
