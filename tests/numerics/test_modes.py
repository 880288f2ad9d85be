"""All offload modes, formats, thread counts and disk engines give one another's losses and state bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from models import FAMILIES
from running import COVERING, REFERENCE, Mode, Outcome, assert_same, every_mode, train

STEPS = 50


@functools.cache
def reference(family: str, dtype: str, directory: Path) -> Outcome:
    return train(family, REFERENCE, directory, dtype=dtype, steps=STEPS)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if "bf16" in family.dtypes])
def test_modes_agree_on_every_family(family, tmp_path, shared):
    expected = reference(family, "bf16", shared)
    assert len(set(expected.losses)) > STEPS // 4, "the weights change, so the losses do (bf16 losses are coarse)"
    for mode in COVERING:
        assert_same(train(family, mode, tmp_path, steps=STEPS), expected, str(mode))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["gpt", "conv", "hf-t5", "sometimes-unused"])
def test_modes_agree_in_fp32(family, tmp_path, shared):
    expected = reference(family, "fp32", shared)
    for mode in COVERING[1:4]:
        got = train(family, mode, tmp_path, dtype="fp32", steps=STEPS)
        assert_same(got, expected, str(mode))


def test_live_weights_are_the_master_rounded_half_up(tmp_path, shared):
    outcome = reference("gpt", "bf16", shared)
    for name, (master, _, _) in outcome.state.items():
        bits = master.view(torch.int32).to(torch.int64)
        rounded = ((bits + 0x8000) >> 16 << 16).to(torch.int32).view(torch.float32)
        assert torch.equal(outcome.weights[name].float(), rounded), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_matrix(family, tmp_path, shared):
    for dtype in FAMILIES[family].dtypes:
        expected = reference(family, dtype, shared)
        modes: list[Mode] = [mode for mode in every_mode() if dtype == "bf16" or mode.format == "fp32"]
        for mode in modes:
            assert_same(train(family, mode, tmp_path, dtype=dtype, steps=STEPS), expected, f"{dtype} {mode}")
