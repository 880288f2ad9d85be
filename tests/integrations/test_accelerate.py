"""A loop for Accelerate under its own launcher, on two ranks, against the same loop under DDP.

Tolerance: see `test_trainer.py`.
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
from safetensors.torch import load_file

CLOSE = 2e-6
LAUNCH = (
    *("-m", "zeroxide.cli", "run", "accelerate", "launch", "--use_deepspeed", "--zero_stage", "3"),
    *("--offload_optimizer_device", "cpu", "--offload_param_device", "cpu", "--zero3_save_16bit_model", "true"),
    *("--gradient_clipping", "1.0", "--gradient_accumulation_steps", "1", "--mixed_precision", "no"),
    *("--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launched(start: tuple[str, ...], folder: Path, *more: str) -> dict:
    folder.mkdir(exist_ok=True)
    modules = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ended = subprocess.run(
        [sys.executable, *start, str(HERE / "accelerate_program.py"), str(folder), "6", *more],
        env={**os.environ, "PYTHONPATH": modules, "PATH": commands, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, launched(TORCHRUN, folder), launched(TORCHRUN, folder, "resume")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zeroxide")
    return folder, launched(LAUNCH, folder), launched(LAUNCH, folder, "resume")


@pytest.mark.parametrize("run", [1, 2], ids=["begun", "resumed"])
def test_numbers_are_those_of_ddp(plain, ours, run):
    """Catches: a state that is not loaded, a schedule that stands still, a rank's batches left out."""
    expected, found = plain[run], ours[run]
    assert (found["ranks"], found["kind"], expected["ranks"]) == (2, "zeroxide.engine.engine", 2)
    assert len(found["losses"]) == 6
    for key in ("losses", "norms", "rates"):
        assert found[key] == pytest.approx(expected[key], rel=CLOSE), key
    assert plain[1]["losses"][0] - expected["losses"][0] > 0.05 or run == 1


def test_the_model_is_saved_whole(plain, ours):
    """Catches: empty tensors, and those of one rank. Adam's step where a gradient is nothing but roundings: see
    `test_trainer.py`."""
    model, expected = (load_file(folder / "model/model.safetensors") for folder, *_ in (ours, plain))
    assert model.keys() == expected.keys()
    apart = torch.cat([(model[key] - values).flatten() for key, values in expected.items()])
    assert apart.square().mean().sqrt() <= 1e-5


def test_a_rank_that_asks_alone_has_names_and_shapes(ours):
    """As every rank but the first does in Accelerate's own way to save. Catches: a rank that waits for ever, and values
    that are nobody's."""
    folder = ours[0]
    alone, model = json.loads((folder / "alone.json").read_text()), load_file(folder / "model/model.safetensors")
    shapes = {name: list(values.shape) for name, values in model.items()}
    assert alone["shapes"] == shapes | {"lm_head.weight": shapes["transformer.wte.weight"]}
    assert alone["halves"] == [[32, 32], [32, 32]]
    assert len(alone["problems"]) == 4
    for line in alone["problems"]:
        assert line.startswith("ModelError: ")
        assert "names and shapes alone" in line
