"""The loss scale in checkpoints, and checkpoints of fp16 training as a whole."""

import json
import math

import pytest
import torch
from checkpointing import VOCABULARY, assemble, assert_same, freeze, state
from checkpointing import Model as Checkpointed
from safetensors.torch import load_file

from zeroxide.errors import CheckpointError

SCALING = {"initial_scale_power": 6, "loss_scale_window": 3, "hysteresis": 2}
SPOILED = (1, 4, 5)
"""Steps whose gradients overflow: one before the checkpoint, which uses up hysteresis, and two after it."""


def train(engine, first, last, spoiled=SPOILED):
    """The scale after each step."""
    scales = []
    for step in range(first, last):
        x = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x) * (math.inf if step in spoiled else 1.0))
        engine.step()
        scales.append(engine.loss_scale())
    return scales


def fp16(make, offload="none", *, seed=0, model=None, scaling=SCALING):
    return make(offload, dtype="fp16", seed=seed, model=model, config={"fp16": scaling})


@pytest.mark.parametrize(("there", "here"), [("none", "nvme"), ("nvme", "none"), ("nvme", "nvme")])
def test_training_goes_on_with_the_same_bits_and_scales(make, tmp_path, there, here):
    """Saved two good steps into a window, with hysteresis used up: each of scale and counters decides what follows."""
    saver = fp16(make, there)
    before = train(saver, 0, 4)
    assert before == [64, 64, 64, 64]
    saver.save_checkpoint(tmp_path / "out")
    after = train(saver, 4, 10)
    assert after == [32, 16, 16, 16, 16, 32]

    loader = fp16(make, here, seed=7)
    train(loader, 20, 22, spoiled=(20, 21))
    assert loader.loss_scale() == 32.0
    loader.load_checkpoint(tmp_path / "out")
    assert loader.loss_scale() == 64.0
    assert loader.skipped_steps == 1
    assert train(loader, 4, 10) == after
    assert_same(state(loader), state(saver))


def test_good_steps_count_on(make, tmp_path):
    saver = fp16(make)
    assert train(saver, 0, 2, spoiled=()) == [64, 64]
    saver.save_checkpoint(tmp_path / "out")
    loader = fp16(make, seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert train(loader, 2, 4, spoiled=()) == [64, 128]


def test_without_optimizer_state_the_scale_starts_anew(make, tmp_path):
    saver = fp16(make, scaling={**SCALING, "hysteresis": 1})
    train(saver, 0, 2)
    path = saver.save_checkpoint(tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["loss_scale"] == {"scale": 32.0, "hysteresis": 1, "good_steps": -1}
    loader = fp16(make, seed=7)
    loader.load_checkpoint(tmp_path / "out", load_optimizer_states=False)
    assert loader.loss_scale() == 64.0
    loader.load_checkpoint(tmp_path / "out")
    assert loader.loss_scale() == 32.0


def test_only_a_scale_that_moves_is_written(make, tmp_path):
    for number, engine in enumerate((make(), make(dtype="fp32"), fp16(make, scaling={"loss_scale": 8}))):
        path = engine.save_checkpoint(tmp_path / "out", tag=str(number))
        assert "loss_scale" not in json.loads((path / "manifest.json").read_text())
        # A dynamic scale goes on as it is.
        loader = fp16(make)
        loader.load_checkpoint(tmp_path / "out", tag=str(number))
        assert loader.loss_scale() == 64.0


def test_checkpoints_pass_between_scalings_and_precisions(make, tmp_path):
    saver = fp16(make)
    train(saver, 0, 3)
    saver.save_checkpoint(tmp_path / "out")
    for loader, scale in ((make(seed=7), 1.0), (fp16(make, seed=7, scaling={"loss_scale": 8}), 8.0)):
        loader.load_checkpoint(tmp_path / "out")
        assert loader.loss_scale() == scale
        assert_same(state(loader), state(saver))


def test_a_damaged_scale_is_refused(make, tmp_path):
    from zeroxide.checkpoint.format.manifest import Manifest, read_manifest

    engine = fp16(make)
    path = engine.save_checkpoint(tmp_path / "out")
    good = read_manifest(path)
    for name, value in (("scale", 0.0), ("scale", math.inf), ("hysteresis", 0), ("good_steps", -2)):
        # A copy is not validated, and its digest fits.
        scale = good.loss_scale.model_copy(update={name: value})
        bad: Manifest = good.model_copy(update={"loss_scale": scale})
        (path / "manifest.json").write_text(bad.text())
        with pytest.raises(CheckpointError, match=f"loss_scale.{name}"):
            engine.load_checkpoint(tmp_path / "out")


def test_frozen_weights_are_stored_in_fp16_and_exported_as_they_are(make, tmp_path):
    saver = fp16(make, "nvme", model=freeze(Checkpointed()))
    train(saver, 0, 2, spoiled=())
    path = saver.save_checkpoint(tmp_path / "out")
    frozen = [name for name, param in saver.module.named_parameters() if not param.requires_grad]
    stored = assemble(path, "weights")
    assert frozen
    assert {stored[name].dtype for name in frozen} == {torch.float16}
    loader = fp16(make, seed=7, model=freeze(Checkpointed()))
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), state(saver))

    live = {}
    for unit in saver.parts.units:
        saver.parts.gatherer.gather(unit)
        live |= {name: param.detach().clone() for name, param in zip(unit.names, unit.params, strict=True)}
        saver.parts.gatherer.release(unit)
    exported = load_file(saver.save_16bit_model(tmp_path / "model"))
    for name, weight in live.items():
        assert exported[name].dtype == torch.float16
        assert torch.equal(exported[name], weight), name
