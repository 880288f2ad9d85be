"""The engine on a device: the same bits as in host memory, and no unordered access."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from models import FAMILIES
from running import REFERENCE, Mode, Outcome, assert_same, train

import zeroxide
from simulated import engines

MODES = {
    "resident": Mode("none", "none", "split"),
    "resident-disk": Mode("none", "nvme", "fp32"),
    "transient": Mode("cpu", "cpu", "split", prefetch=0),
    "transient-ahead": Mode("cpu", "cpu", "fp32", prefetch=2),
    "transient-disk": Mode("nvme", "nvme", "split", prefetch=1),
    "on-device": Mode("none", "none", "split"),
    "on-device-master": Mode("none", "none", "fp32"),
}
STEPS = 3
WITHOUT = {"recurrent"}
"""torch's LSTM on anything but a CPU is a kernel of GPUs, for which the host has no operator."""

DEAR = {"hf-t5", "hf-gpt2-reentrant", "hf-gpt2-nonreentrant", "gpt-reentrant", "gpt-nonreentrant"}


@pytest.fixture(autouse=True)
def quick(sim):
    sim.set_delay(0, 200, seed=2)


@cache
def on_the_host(family: str) -> Outcome:
    """What every mode comes to, as other tests show."""
    return train(family, REFERENCE, Path(), dtype=FAMILIES[family].dtypes[0], steps=STEPS)


def check(family: str, mode: str, folder: Path, sim) -> None:
    on_device = mode.startswith("on-device")

    def watch(engine: zeroxide.Engine, step: int) -> None:
        assert bool(engine.plan().units_on_device) == on_device

    dtype = FAMILIES[family].dtypes[0]
    with engines.followed(kernels=on_device):
        there = train(family, MODES[mode], folder, dtype=dtype, steps=STEPS, device="sim", watch=watch)
    assert_same(there, on_the_host(family), f"{family} {mode}")
    assert [str(each) for each in sim.races()] == []


def cases() -> list:
    """Where state is says nothing of how activations come about."""
    return [
        pytest.param(family, mode, marks=[pytest.mark.slow] if mode == "on-device" and family in DEAR else [])
        for family in FAMILIES
        for mode in ("resident", "transient-ahead", "transient-disk", "on-device")
        if family not in WITHOUT
    ]


@pytest.mark.parametrize(("family", "mode"), cases())
def test_every_family_has_the_bits_of_the_host(family, mode, tmp_path, sim):
    """Catches: a wait that is missing, memory that is given back too early, a weight that is read when it is not there,
    a gradient that is read before it has come, buffers left behind, frozen weights that are read as state."""
    check(family, mode, tmp_path, sim)


@pytest.mark.parametrize("mode", ["resident-disk", "transient", "on-device-master"])
def test_other_homes_have_the_bits_of_the_host(mode, tmp_path, sim):
    check("gpt", mode, tmp_path, sim)
