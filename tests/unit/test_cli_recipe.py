"""The defaults of `zeroxide train`: what `make train` runs has a loss that falls without a spike."""

import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.schedule import fraction_of_peak

ROOT = Path(__file__).parents[2]
WINDOW = 5

LARGEST_RISE = 1.2
"""Nats by which a step's loss may exceed the lowest mean of five steps in a row before it.

A step's loss is a mean over 8 windows of text, and what a trained model loses on a window has a standard deviation of
0.73 over windows: 0.26 for a step, 0.12 for the mean of five, 0.28 for the difference. The lowest of many means is low
by chance, by twice its own deviation at most: 0.24. On top of that 3.4 deviations of the difference, 0.96, come about
once in 3000 steps of a curve that is flat, and later than that where it falls. A window that is predicted with the
wrong sign costs 7 to 8 nats more than others: two of them raise a step's loss by 1.9, and a spike has more.
"""

LEAST_FALL = 3.0
"""Nats between the first step's loss, which is ln 50257 = 10.8 for weights that know nothing, and the last five.

A model that knows how frequent each token is, and nothing else, is 4.0 below it: 6.76 is the entropy of the tokens.
"""


def largest_rise(losses: list[float]) -> float:
    means = [fmean(losses[end - WINDOW : end]) for end in range(WINDOW, len(losses))]
    lowest = itertools.accumulate(means, min)
    return max(loss - low for loss, low in zip(losses[WINDOW:], lowest, strict=True))


def test_the_criterion_sees_a_spike_and_no_fall():
    falling = [11.0 - 0.06 * step for step in range(60)]
    assert largest_rise(falling) < 0
    falling[33] += 2.0
    assert largest_rise(falling) == pytest.approx(2.0 - 0.06 * 3)


@given(st.integers(1, 20_000), st.sampled_from(["cosine", "linear", "constant"]))
def test_the_rate_rises_slowly_by_default(steps, schedule):
    """No step raises it by more than three times what an even rise over the whole run would, or a hundredth."""
    options = TrainOptions(steps=steps, schedule=schedule).checked()
    rising = [fraction_of_peak(step, options) for step in range(min(steps, options.warmup + 1))]
    assert rising[-1] == 1.0
    for before, after in itertools.pairwise([0.0, *rising]):
        assert 0.0 < after - before <= max(3 / steps, 1 / 100) + 1e-12


def recipe(out: Path) -> list[str]:
    """Return the options that the Makefile gives `zeroxide train`, with `out` for its run folder."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TRAIN_ARGS ?= ")]
    options = shlex.split(line.partition("=")[2])
    return [option.replace("runs/gpt2", str(out)) for option in options]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_of_make_train_falls_without_a_spike(tmp_path, seed):
    pytest.importorskip("zeroxide._core")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "zeroxide.cli", "train", *recipe(out), "--seed", str(seed), "--sample-tokens", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    events = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) >= 60
    assert largest_rise(losses) < LARGEST_RISE
    assert losses[0] - fmean(losses[-WINDOW:]) > LEAST_FALL
