"""Accelerate's `ParallelismConfig(sp_backend="deepspeed")`, and Trainer with it, over two ranks, against plain PyTorch
in one process.

Tolerances: losses 2e-6 relative; weights after 12 steps of Adam with an epsilon that noise does not reach, where a step
moves them by 1e-3: 1e-5.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import HERE, PACKAGE
from test_accelerate import LAUNCH

PROGRAM, TRAINER = HERE / "accelerate_sequence_program.py", HERE / "trainer_sequence_program.py"
RANKS = ("-m", "zeroxide.cli", "run", "torchrun", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where both have left what became of them."""
    found: Path = tmp_path_factory.mktemp("shared")
    modules = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "PYTHONPATH": modules, "PATH": commands, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for start in ((PROGRAM,), (*LAUNCH, PROGRAM), (TRAINER,), (*RANKS, TRAINER)):
        ended = subprocess.run(
            [sys.executable, *map(str, start), str(found)], env=env, capture_output=True, text=True, timeout=280
        )
        assert ended.returncode == 0, ended.stderr[-6000:]
    return found


def test_two_ranks_that_share_sequences_train_as_one_process(folder):
    """Catches: an mpu that is not heard, a batch that counts for both ranks, labels of the next rank's first token,
    documents across ranks, and a loss that counts a rank's tokens twice."""
    plain, shared = torch.load(folder / "plain.pt"), json.loads((folder / "results.json").read_text())
    assert shared["length"] == len(plain["losses"]) == 12
    assert shared["losses"] == pytest.approx(plain["losses"], rel=2e-6)
    weights = torch.load(folder / "weights.pt")
    assert set(weights) == set(plain["weights"])
    for name, expected in plain["weights"].items():
        assert (weights[name] - expected).abs().max().item() <= 1e-5, name


def test_trainer_trains_as_in_one_process(folder):
    """Catches: a loss that Trainer cannot put together from the groups, and documents across ranks."""
    shared, plain = (json.loads((folder / f"trainer{ranks}.json").read_text()) for ranks in (2, 1))
    assert len(plain) == 6
    assert shared == pytest.approx(plain, rel=2e-6)
