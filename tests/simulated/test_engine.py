"""The engine on a device: the same bits as in host memory, and no unordered access."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from models import FAMILIES
from running import REFERENCE, Mode, Outcome, assert_same, train

from simulated import engines

MODES = {
    "resident": Mode("none", "none", "split"),
    "resident-disk": Mode("none", "nvme", "fp32"),
    "transient": Mode("cpu", "cpu", "split", prefetch=0),
    "transient-ahead": Mode("cpu", "cpu", "fp32", prefetch=2),
    "transient-disk": Mode("nvme", "nvme", "split", prefetch=1),
}
STEPS = 3
WITHOUT = {"recurrent"}
"""torch's LSTM on anything but a CPU is a kernel of GPUs, for which the host has no operator."""


@pytest.fixture(autouse=True)
def quick(sim):
    sim.set_delay(0, 200, seed=2)


@cache
def on_the_host(family: str) -> Outcome:
    """What every mode comes to, as other tests show."""
    return train(family, REFERENCE, Path(), dtype=FAMILIES[family].dtypes[0], steps=STEPS)


def check(family: str, mode: str, folder: Path, sim) -> None:
    with engines.followed():
        there = train(family, MODES[mode], folder, dtype=FAMILIES[family].dtypes[0], steps=STEPS, device="sim")
    assert_same(there, on_the_host(family), f"{family} {mode}")
    assert [str(each) for each in sim.races()] == []


@pytest.mark.parametrize("mode", ["resident", "transient-ahead", "transient-disk"])
@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in WITHOUT])
def test_every_family_has_the_bits_of_the_host(family, mode, tmp_path, sim):
    """Catches: a wait that is missing, memory that is given back too early, a weight that is read when it is not there,
    a gradient that is read before it has come, buffers left behind."""
    check(family, mode, tmp_path, sim)


@pytest.mark.parametrize("mode", ["resident-disk", "transient"])
def test_other_homes_have_the_bits_of_the_host(mode, tmp_path, sim):
    check("gpt", mode, tmp_path, sim)
