"""Hugging Face's Trainer and Accelerate with a DeepSpeed config: the packages as they are, on one rank and on two.

Losses are compared with Trainer's own, in fp32 on the same data. Tolerance: what the two compute is the same but for
the order of sums (the norm, the mean of micro-batches): a few roundings of 2**-24 a step in the gradients, which Adam
turns into as many of its update of at most 1e-3 a weight. Six steps and a loss near 4 leave less than 2e-6 of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import run_cases
from safetensors.torch import load_file

CLOSE = 2e-6

ONE_RANK = [
    ("plain", None, "none", []),
    ("plain best", None, "none", ["best"]),
    ("plain generation", None, "none", ["generation"]),
    ("plain rates", None, "none", ["deepspeed's rates"]),
    ("stage 1", 1, "none", []),
    ("stage 2 cpu", 2, "cpu", ["best"]),
    ("stage 2 nvme config", 2, "nvme", ["optimizer in the config"]),
    ("stage 3", 3, "none", ["generation"]),
    ("stage 3 nvme", 3, "nvme", ["optimizer in the config", "best"]),
    ("plain bf16", None, "none", ["bf16"]),
    ("plain pretrained", None, "none", ["from_pretrained", "resized"]),
    ("stage 3 cpu", 3, "cpu", ["from_pretrained", "resized"]),
    ("stage 3 bf16", 3, "nvme", ["bf16"]),
    ("stage 2 fp16", 2, "cpu", ["fp16"]),
]
LOW = ["stage 3 bf16", "stage 2 fp16"]
"""Those that compute in 16 bits."""
SCHEDULED = [name for name, _, _, more in ONE_RANK if "optimizer in the config" in more]
"""Those whose rates DeepSpeed's schedule gives, which begins a step later than Trainer's."""
TWO_RANKS = [
    ("ranks 2", 2, "cpu", ["two ranks"]),
    ("ranks 3", 3, "nvme", ["two ranks", "from_pretrained"]),
    ("resumed", 3, "none", ["two ranks", "resume stage 1"]),
]


def train(folder: Path, cases, *options: str):
    return run_cases("trainer_program.py", folder, cases, *options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("trainer")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    GPT2LMHeadModel(config).save_pretrained(place / "pretrained")
    return place


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, ONE_RANK)


@pytest.fixture(scope="module")
def together(folder, alone):
    return train(folder, TWO_RANKS, "--ranks", "2")


def check_alike(found, plain):
    """The same numbers at every step."""
    assert len(found["losses"]) == 6
    for key in ("losses", "norms", "evaluations"):
        assert found[key] == pytest.approx(plain[key], rel=CLOSE), key


@pytest.mark.parametrize(
    "name", [name for name, stage, _, more in ONE_RANK if stage and name not in LOW and "from_pretrained" not in more]
)
def test_losses_are_those_of_trainer_alone(alone, name):
    """Catches: an optimizer or a clipping of other numbers, boundaries that are not Trainer's, a mean that is a sum."""
    check_alike(alone[name], alone["plain rates" if name in SCHEDULED else "plain"])
    assert alone[name]["engine"] == "zeroxide.engine.engine"


@pytest.mark.parametrize(("name", "plain"), [("stage 3 bf16", "plain bf16"), ("stage 2 fp16", "plain")])
def test_losses_in_16_bits(alone, name, plain):
    """Against Trainer's autocast in bf16, and its fp32. bf16 keeps 8 bits: logits below 1/2 are off by 2**-10, which
    moves a loss near 4 by no more than twice that, and weights rounded once more by as much again; gradients are off
    by 2**-8 of themselves, twice. fp16 keeps 3 bits more. Catches: a loss scale that stays in, weights that stay."""
    found, bits = alone[name], 11 if "fp16" in name else 8
    assert found["losses"] == pytest.approx(alone[plain]["losses"], rel=2.0**-bits / 4)
    assert found["evaluations"] == pytest.approx(alone[plain]["evaluations"], rel=2.0**-bits / 4)
    assert found["norms"] == pytest.approx(alone[plain]["norms"], rel=2 * 2.0**-bits)


def test_weights_that_are_loaded_in_parts(alone):
    """`from_pretrained` under ZeRO-3, and an embedding made larger. Catches: a weight that no rank has loaded."""
    check_alike(alone["stage 3 cpu"], alone["plain pretrained"])


@pytest.mark.parametrize("name", ["ranks 2", "resumed"])
def test_two_ranks_train_as_one(alone, together, name):
    """Catches: a rank's micro-batches left out, and a checkpoint of one rank that two read otherwise."""
    found, plain = together[name], alone["plain"]
    count = len(found["losses"])
    assert count == 6
    for key in ("losses", "norms", "evaluations"):
        assert found[key] == pytest.approx(plain[key], rel=CLOSE), key


def test_generation_between_steps(alone):
    """Catches: weights of before the step, and a training that goes on otherwise."""
    written = alone["stage 3"]["written"]
    assert len(written) == 6
    assert written == alone["plain generation"]["written"]


def test_the_best_model_is_loaded_at_the_end(alone, folder):
    for name in ("stage 2 cpu", "stage 3 nvme"):
        assert Path(alone[name]["best"]).name == Path(alone["plain best"]["best"]).name


@pytest.mark.parametrize("name", ["stage 1", "stage 2 cpu", "stage 3 nvme", "stage 3", "ranks 3"])
def test_folders_are_those_that_trainer_looks_for(alone, together, folder, name):
    found = (alone | together)[name]["checkpoint"]
    assert {"global_step6", "latest", "config.json", "model.safetensors", "trainer_state.json"} <= set(found)
    model = load_file(folder / f"{name}-model/model.safetensors")
    plain = load_file(folder / "plain-model/model.safetensors")
    assert {key: values.shape for key, values in model.items()} == {key: values.shape for key, values in plain.items()}


@pytest.mark.parametrize("name", ["stage 1", "stage 3", "ranks 2"])
def test_what_is_saved_is_what_trainer_alone_saves(alone, together, folder, name):
    """Catches: weights of before the last step, or of one rank's part. Adam divides by the root of a mean that may be
    as small as a rounding, so a weight whose gradient is nothing but roundings may move by a full rate at each step;
    all together they have moved by no more than a hundredth of what training has moved them."""
    model = load_file(folder / f"{name}-model/model.safetensors")
    plain = load_file(folder / "plain-model/model.safetensors")
    begun = load_file(folder / "begun-model/model.safetensors")
    apart = sum((model[key] - values).square().sum() for key, values in plain.items()).sqrt()
    moved = sum((begun[key] - values).square().sum() for key, values in plain.items()).sqrt()
    assert apart <= 0.01 * moved
