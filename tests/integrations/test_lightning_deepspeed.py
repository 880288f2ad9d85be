"""Lightning's own DeepSpeedStrategy over zeroxide under DeepSpeed's name, but for its check that there is a GPU.

Numbers are compared with those of Lightning's DDP; tolerance: see `test_trainer.py`.
"""

from __future__ import annotations

import pytest
import torch
from programs import run_cases

CLOSE = 2e-6

ONE_RANK = [
    ("plain", None, []),
    ("stage 2", {"stage": 2, "offload_optimizer": True}, []),
    (
        "stage 3",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True, "cpu_checkpointing": True},
        ["late"],
    ),
    ("resumed", {"stage": 3}, ["resume stage 2"]),
]
TWO_RANKS = [("ranks", {"stage": 3}, ["two ranks"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lightning_deepspeed")


@pytest.fixture(scope="module")
def found(folder):
    alone = run_cases("lightning_deepspeed_program.py", folder, ONE_RANK)
    return alone | run_cases("lightning_deepspeed_program.py", folder, TWO_RANKS)


@pytest.mark.parametrize("name", ["stage 2", "stage 3", "resumed", "ranks"])
def test_numbers_are_those_of_ddp(found, folder, name):
    """Catches: rates that nobody changes, or the engine as well, clipping by another norm, a state of Lightning's that
    is not restored, an evaluation with other weights, a second engine that begins from others."""
    ours, plain = found[name], found["plain"]
    first = 5 if name == "resumed" else 0
    assert ours["engine"] == "zeroxide.engine.engine"
    assert ours["steps"] == 10
    for key in ("losses", "rates"):
        assert ours[key] == pytest.approx(plain[key][first:], rel=CLOSE), key
    for key in ("validation", "score"):
        assert ours[key] == pytest.approx(plain[key], rel=CLOSE), key


@pytest.mark.parametrize("name", ["stage 2", "stage 3", "ranks"])
def test_lightning_makes_one_file_of_a_folder(found, folder, name):
    """Its own function does. Catches: weights that are rounded or missing, and states of Lightning's that are lost."""
    whole, plain = torch.load(folder / f"{name}.ckpt"), torch.load(folder / "plain.pt")
    assert (whole["epoch"], whole["global_step"], whole["hyper_parameters"]["rate"]) == (1, 10, 0.01)
    weights = whole["state_dict"]
    assert weights.keys() == plain.keys()
    apart = torch.cat([(weights[key] - values).flatten() for key, values in plain.items()])
    # Adam turns roundings into parts of a rate of 1e-2; together they are far below one.
    assert apart.square().mean().sqrt() <= 1e-5
