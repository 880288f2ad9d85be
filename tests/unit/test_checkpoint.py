"""Checkpoints: the same bits whatever saved and whatever loads, and files as others read them."""

import json

import pytest
import torch
from checkpointing import FP32_BUFFERS, PARTS, Model, assemble, assert_same, state, train
from safetensors import safe_open

import zeroxide
from zeroxide.checkpoint.format import cutting

# The same bits -----------------------------------------------------------------------------------------------------

HOMES = [("none", "fp32"), ("none", "split"), ("cpu", "split"), ("nvme", "fp32"), ("nvme", "split")]


@pytest.fixture(scope="module")
def straight():
    """Losses and state after four steps without a checkpoint."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    engine, *_ = zeroxide.initialize(
        model=Model(),
        config={"zeroxide": {"format": "fp32"}, **FP32_BUFFERS},
        lr=1e-2,
        weight_decay=0.1,
        gradient_clipping=1.0,
        dtype="bf16",
    )
    losses = train(engine, 0, 4)
    found = state(engine)
    engine.destroy()
    return losses, found


@pytest.mark.parametrize("there", HOMES, ids="-".join)
@pytest.mark.parametrize("here", HOMES, ids="-".join)
def test_training_goes_on_with_the_same_bits(make, tmp_path, straight, there, here):
    losses, final = straight
    saver = make(*there)
    assert train(saver, 0, 2) == losses[:2]
    saver.save_checkpoint(tmp_path / "out", client_state={"step": 2})
    at_save = state(saver)
    # Saving disturbs nothing.
    assert train(saver, 2, 4) == losses[2:]
    assert_same(state(saver), final)

    loader = make(*here, seed=7)
    path, client_state = loader.load_checkpoint(tmp_path / "out")
    assert path == tmp_path / "out" / "global_step2"
    assert client_state == {"step": 2}
    assert_same(state(loader), at_save)
    assert train(loader, 2, 4) == losses[2:]
    assert_same(state(loader), final)


@pytest.mark.parametrize("here", ["none", "nvme"])
def test_fp32_training_goes_on_with_the_same_bits(make, tmp_path, here):
    saver = make("nvme", dtype="fp32")
    losses = train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    losses += train(saver, 2, 4)
    loader = make(here, dtype="fp32", seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert train(loader, 2, 4) == losses[2:]
    assert_same(state(loader), state(saver))


def test_units_and_tiles_of_another_size_load_the_same_bits(make, tmp_path):
    large = {"tied": False, "vocabulary": 20_000}
    saver = make("nvme", "split", model=Model(**large))
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    torch.manual_seed(7)
    loader = make("nvme", "fp32", model=Model(**large), zeroxide_config={"unit_bytes": "1MiB", "tile_bytes": "64KiB"})
    assert len(loader.parts.units) > len(saver.parts.units)
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), state(saver))


def test_master_weights_pass_between_precisions(make, tmp_path):
    saver = make("none", "split")
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make("none", dtype="fp32", seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), state(saver))


def test_chunks_smaller_than_parameters_give_the_same_bits(make, tmp_path, monkeypatch):
    saver = make("nvme", "split")
    train(saver, 0, 2)
    whole = saver.save_checkpoint(tmp_path / "out", tag="whole")
    from zeroxide.checkpoint import live_state

    monkeypatch.setattr(live_state.Staging.__init__, "__defaults__", (100,))
    cut = saver.save_checkpoint(tmp_path / "out", tag="cut")
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (cut / file.name).read_bytes()
    loader = make("none", "fp32", seed=7)
    loader.load_checkpoint(tmp_path / "out", tag="cut")
    assert_same(state(loader), state(saver))


def test_the_same_state_gives_the_same_files(make, tmp_path):
    engine = make()
    train(engine, 0, 1)
    one = engine.save_checkpoint(tmp_path / "out", tag="one")
    two = engine.save_checkpoint(tmp_path / "out", tag="two")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


# What is in the files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1 << 31, 20_000, 4000, 300])
def test_the_reference_library_reads_the_files(make, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(cutting, "FILE_BYTES", limit)
    engine = make("nvme", "split")
    train(engine, 0, 2)
    path = engine.save_checkpoint(tmp_path / "out")
    expected = state(engine)
    names = {key[0] for key in expected if key[1] == "weights"}
    for part in PARTS:
        found = assemble(path, part)
        assert found.keys() == names
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert tensor.flatten().view(torch.int32).equal(expected[name, part]), name
    buffers = assemble(path, "buffers")
    assert buffers.keys() == {
        "mask",
        "empty",
        "turned",
        "seen.running_mean",
        "seen.running_var",
        "seen.num_batches_tracked",
    }
    for name, tensor in buffers.items():
        assert tensor.reshape(expected[name, "buffer"].shape).equal(expected[name, "buffer"])
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert max(sizes) < limit + 4096
    if limit == 4000:
        assert len(sizes) > 15
        assert any("[" in key for file in path.glob("weights-*") for key in safe_open(file, "pt").keys())  # noqa: SIM118
    loader = make("none", "fp32", seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), expected)


def test_the_manifest_tells_all(make, tmp_path):
    engine = make("nvme", "split")
    train(engine, 0, 3)
    path = engine.save_checkpoint(tmp_path / "out", "mine", {"epoch": 1.5})
    assert (tmp_path / "out" / "latest").read_text() == "mine\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 5
    assert manifest["zeroxide"] == zeroxide.__version__
    assert manifest["counters"] == {"global_steps": 3, "global_samples": 3, "micro_steps": 3, "skipped_steps": 0}
    assert manifest["client_state"] == {"epoch": 1.5}
    by_name = {param["names"][0]: param for param in manifest["parameters"]}
    assert by_name["embed.weight"]["names"] == ["embed.weight", "head.weight"]
    assert "head.weight" not in by_name
    assert by_name["blocks.1.up.weight"]["shape"] == [97, 32]
    assert by_name["blocks.1.up.weight"]["trainable"]
    assert all(param["updates"] == 3 for param in by_name.values())
    assert {file["name"] for file in manifest["files"]} == {file.name for file in path.glob("*.safetensors")}
    assert all((path / file["name"]).stat().st_size == file["bytes"] for file in manifest["files"])


def test_latest_follows_only_where_asked(make, tmp_path):
    engine = make()
    engine.save_checkpoint(tmp_path, "one")
    train(engine, 0, 1)
    engine.save_checkpoint(tmp_path, "two", save_latest=False)
    assert engine.load_checkpoint(tmp_path)[0].name == "one"
    assert engine.load_checkpoint(tmp_path, "two")[0].name == "two"
    assert engine.global_steps == 1


def test_an_existing_tag_is_replaced(make, tmp_path):
    engine = make()
    engine.save_checkpoint(tmp_path / "out", "same")
    train(engine, 0, 2)
    engine.save_checkpoint(tmp_path / "out", "same")
    expected = state(engine)
    train(engine, 2, 3)
    engine.load_checkpoint(tmp_path / "out")
    assert_same(state(engine), expected)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"same", "latest"}
