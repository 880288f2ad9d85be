"""Converting checkpoints: DeepSpeed's into ours, and either into a folder of safetensors."""

import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpointing import Model, assemble, freeze, train
from deepspeed_files import PARTS, made_up, write
from safetensors.torch import load_file
from several_ranks import join, on_all
from torch import nn

from zeroxide.checkpoint.convert.convert import convert
from zeroxide.checkpoint.format import cutting
from zeroxide.cli import main
from zeroxide.errors import CheckpointError, ConfigError, StorageError


def run(source, target, to=None, tag=None, *, frozen=True):
    return convert(Path(source), Path(target), to, tag, include_frozen=frozen)


LAYOUTS = [
    {"stage": 1, "world": 1},
    {"stage": 1, "world": 2, "prefix": ""},
    {"stage": 2, "world": 2},
    {"stage": 2, "world": 3, "prefix": "fp16_"},
    {"stage": 2, "world": 8},
    {"stage": 2, "world": 2, "aligned": 4},
    {"stage": 3, "world": 1},
    {"stage": 3, "world": 2, "prefix": ""},
    {"stage": 3, "world": 3, "sub_groups": 2},
    {"stage": 3, "world": 4, "sub_groups": 4},
]


@pytest.mark.parametrize("limit", [1 << 31, 100])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_of_a_deepspeed_checkpoint_arrives(tmp_path, monkeypatch, layout, limit):
    monkeypatch.setattr(cutting, "FILE_BYTES", limit)
    written = made_up()
    write(tmp_path / "theirs", written, **layout)
    path, notes = run(tmp_path / "theirs", tmp_path / "ours")
    assert path == tmp_path / "ours" / "global_step3"
    assert notes == []
    assert "deepspeed" not in sys.modules
    for part in PARTS:
        found = assemble(path, part)
        expected = {name: value for (name, of), value in written.values.items() if of == part}
        expected |= written.frozen if part == "weights" else {}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert found[name].reshape(value.shape).equal(value), (part, name)
    for name, value in assemble(path, "buffers").items():
        assert value.reshape(written.buffers[name].shape).equal(written.buffers[name])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["counters"] == {"global_steps": 3, "global_samples": 24, "micro_steps": 6, "skipped_steps": 1}
    assert manifest["client_state"] == {"epoch": 1.5}
    assert manifest["scheduler"] == {"kind": "WarmupLR", "state": {"last_batch_iteration": 2}}
    assert [group["hyperparameters"]["lr"] for group in manifest["groups"]] == [0.01, 0.02]
    for param in manifest["parameters"]:
        name = param["names"][0]
        group = next((number for number, names in enumerate(written.groups) if name in names), None)
        assert (param["group"], param["updates"]) == (group, 0 if group is None else 3), name
    assert manifest["parameters"][0]["names"] == ["embed.weight", "head.weight"]


@pytest.mark.parametrize("layout", [{"stage": 2, "world": 2}, {"stage": 3, "world": 2}], ids=str)
def test_a_checkpoint_before_the_first_step_has_zero_moments(tmp_path, layout):
    write(tmp_path / "theirs", made_up(), steps=0, **layout)
    path, _ = run(tmp_path / "theirs", tmp_path / "ours")
    assert not any(value.any() for part in PARTS[1:] for value in assemble(path, part).values())
    assert all(param["updates"] == 0 for param in json.loads((path / "manifest.json").read_text())["parameters"])


class Made(nn.Module):
    """A model with the names of `made_up`."""

    def __init__(self, written):
        super().__init__()
        for name, value in [
            *((name, written.values[name, "weights"]) for group in written.groups for name in group),
            *written.frozen.items(),
        ]:
            owner, _, last = name.rpartition(".")
            module = self
            for step in filter(None, owner.split(".")):
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = getattr(module, step)
            module.register_parameter(
                last, nn.Parameter(torch.zeros_like(value), requires_grad=name not in written.frozen)
            )
        self.add_module("head", nn.Module())
        self.head.weight = self.embed.weight
        for name, value in written.buffers.items():
            self.register_buffer(name, torch.zeros_like(value))

    def forward(self):
        return sum(param.float().square().sum() for param in self.parameters())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.usefixtures("sharded")
def test_an_engine_goes_on_from_what_was_converted(make, tmp_path, size):
    written = made_up()
    write(tmp_path / "theirs", written, stage=3, world=2)
    run(tmp_path / "theirs", tmp_path / "ours")
    engines = []
    for _ in range(size):
        model = Made(written)
        named = dict(model.named_parameters())
        groups = [{"params": [named[name] for name in names], "lr": 1.0} for names in written.groups]
        engines.append(
            make(
                model=model,
                model_parameters=groups,
                config={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}},
            )
        )
    states = on_all(join(engines), lambda engine: engine.load_checkpoint(tmp_path / "ours")[1])
    assert states == [{"epoch": 1.5}] * size
    for engine in engines:
        assert engine.global_steps == 3
        assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.0, 0.1]
        assert engine.lr_scheduler.last_batch_iteration == 2
        unit = engine.parts.units[0]
        assert engine.parts.core().updates(0, unit.names.index("embed.weight")) == 3
    engine = engines[0]
    engine.backward(engine())
    engine.step()
    assert engine.was_step_applied()


# Refused -----------------------------------------------------------------------------------------------------------


def refused(tmp_path, line):
    with pytest.raises(CheckpointError, match=line) as caught:
        run(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("how", ["inside", "bare", "raw"])
def test_foreign_code_is_never_run(tmp_path, file, how):
    target = write(tmp_path / "theirs", made_up(), stage=2, world=2)
    attack = Attack(tmp_path / "attacked")
    if how == "inside":
        found = torch.load(target / file, weights_only=False) if file.startswith("mp") else {"optimizer_state_dict": {}}
        torch.save({**found, "extra": attack}, target / file)
        refused(tmp_path, rf"{file} is not read: it asks for posix.mkdir")
    elif how == "bare":
        with zipfile.ZipFile(target / file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(attack))
            archive.writestr("archive/version", "3\n")
        refused(tmp_path, file)
    else:
        (target / file).write_bytes(pickle.dumps(attack))
        refused(tmp_path, file)
    assert not (tmp_path / "attacked").exists()


def test_a_class_of_deepspeed_may_not_smuggle_anything_in(tmp_path):
    """A name under `deepspeed.` is never imported, also where there is such a module."""
    target = write(tmp_path / "theirs", made_up(), stage=2, world=1)
    import types

    module = types.ModuleType("deepspeed")
    called = []
    module.trap = type("trap", (), {"__module__": "deepspeed", "__reduce__": lambda self: (module.trap, ())})
    sys.modules["deepspeed"] = module
    try:
        found = torch.load(target / "mp_rank_00_model_states.pt", weights_only=True)
        torch.save({**found, "extra": module.trap()}, target / "mp_rank_00_model_states.pt")
        module.trap.__init__ = lambda self: called.append(True)
        _, notes = run(tmp_path / "theirs", tmp_path / "ours")
    finally:
        del sys.modules["deepspeed"]
    assert called == []
    assert len(notes) == 1
    assert "client_state['extra']" in notes[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_damaged_file_is_named(tmp_path, stage):
    target = write(tmp_path / "theirs", made_up(), stage=stage, world=2)
    for file in sorted(target.iterdir()):
        whole = file.read_bytes()
        for end in (0, 10, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:end])
            refused(tmp_path, file.name)
        file.unlink()
        refused(tmp_path, "is missing|it was saved by 2 ranks and has the optimizer state of 1")
        file.write_bytes(whole)
    assert run(tmp_path / "theirs", tmp_path / "ours")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    target = write(tmp_path / "theirs", made_up(), stage=2, world=2)
    first, second = (target / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))
    stale = target / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    stale.write_bytes(second.read_bytes())
    refused(tmp_path, r"are of one rank: remove the stale one")
    stale.rename(target / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    refused(tmp_path, "saved by 2 ranks and has the optimizer state of 3")
    (target / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    (target / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(first.read_bytes())
    refused(tmp_path, "belongs to model parallelism")
    (target / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()
    (target / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"")
    refused(tmp_path, "it has experts")
    (target / "layer_0_expert_1_mp_rank_00_model_states.pt").unlink()
    model = target / "mp_rank_00_model_states.pt"
    found = torch.load(model, weights_only=True)
    torch.save({**found, "param_shapes": None}, model)
    refused(tmp_path, "saved without ZeRO")
    torch.save(
        {
            **found,
            "param_shapes": [OrderedDict(found["param_shapes"][0], more=torch.Size([999])), found["param_shapes"][1]],
        },
        model,
    )
    refused(tmp_path, "more is not complete")
    torch.save({key: value for key, value in found.items() if key != "buffer_names"}, model)
    refused(tmp_path, "is not laid out as DeepSpeed's checkpoints are: KeyError: 'buffer_names'")
    torch.save([1], model)
    refused(tmp_path, "it holds no dict")


def test_what_the_client_saved_and_we_cannot_hold_is_said(tmp_path):
    write(
        tmp_path / "theirs",
        made_up(),
        stage=2,
        world=1,
        extra={
            "more": {"tensor": torch.ones(20000), "score": torch.ones(1)},
            "lr_scheduler": {"a": 1},
            "ds_config": {},
        },
    )
    path, notes = run(tmp_path / "theirs", tmp_path / "ours")
    assert len(notes) == 2
    assert any("client_state['more']['tensor'] has 80000 bytes" in note for note in notes)
    assert any("schedule is left out" in note for note in notes)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["client_state"] == {"epoch": 1.5}
    assert manifest["scheduler"] is None


def test_existing_checkpoints_survive_a_conversion_that_fails(tmp_path, monkeypatch):
    from zeroxide.checkpoint.format import stream

    write(tmp_path / "theirs", made_up(), stage=2, world=1)
    path, _ = run(tmp_path / "theirs", tmp_path / "ours")
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(writer, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.StreamWriter, "write", full)
    with pytest.raises(StorageError, match=r"nothing was written to .*No space left on device"):
        run(tmp_path / "theirs", tmp_path / "ours")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert {each.name for each in (tmp_path / "ours").iterdir()} == {"global_step3", "latest"}


# Into a model folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1 << 31, 5000])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.usefixtures("sharded")
def test_our_checkpoints_become_the_model_that_the_engine_exports(make, tmp_path, monkeypatch, size, limit):
    monkeypatch.setattr(cutting, "FILE_BYTES", limit)
    engines = [make(model=freeze(Model())) for _ in range(size)]
    for engine in engines:
        train(engine, 0, 3)
    on_all(join(engines), lambda engine: engine.save_checkpoint(tmp_path / "out"))
    on_all(engines, lambda engine: engine.save_16bit_model(tmp_path / "exported"))
    path, notes = run(tmp_path / "out", tmp_path / "bf16", "bf16")
    assert notes == []
    names = sorted(file.name for file in (tmp_path / "exported").iterdir())
    assert path.name in names
    assert sorted(file.name for file in (tmp_path / "bf16").iterdir()) == names
    for name in names:
        assert (tmp_path / "bf16" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name
    run(tmp_path / "out", tmp_path / "fp32")
    found = {key: value for file in (tmp_path / "fp32").glob("*.safetensors") for key, value in load_file(file).items()}
    for name, value in assemble(tmp_path / "out" / "global_step3", "weights").items():
        assert found[name].dtype == torch.float32
        assert found[name].flatten().equal(value.float().flatten()), name
    run(tmp_path / "out" / "global_step3", tmp_path / "fp16", "fp16")
    half = {key: value for file in (tmp_path / "fp16").glob("*.safetensors") for key, value in load_file(file).items()}
    assert all(half[name].equal(found[name].half()) for name in ("embed.weight", "blocks.1.up.weight"))


def test_theirs_become_a_model_at_once(tmp_path):
    written = made_up()
    write(tmp_path / "theirs", written, stage=3, world=2)
    path, _ = run(tmp_path / "theirs" / "global_step3", tmp_path / "model", "fp32", frozen=False)
    found = load_file(path)
    assert found.keys() == {name for name, _ in written.values} | written.buffers.keys()
    assert all(found[name].equal(value) for (name, part), value in written.values.items() if part == "weights")


def test_frozen_weights_that_were_not_saved_are_asked_for(make, tmp_path):
    engine = make(model=freeze(Model()))
    engine.save_checkpoint(tmp_path / "out", exclude_frozen_parameters=True)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.up\.weight are not in the checkpoint.*--exclude-frozen"):
        run(tmp_path / "out", tmp_path / "model")
    path, _ = run(tmp_path / "out", tmp_path / "model", frozen=False)
    assert "blocks.0.up.weight" not in load_file(path)


def test_only_weights_are_read_for_a_model(make, tmp_path):
    path = make().save_checkpoint(tmp_path / "out")
    for file in path.glob("exp_avg*"):
        file.unlink()
    run(tmp_path / "out", tmp_path / "model")
    data = bytearray((path / "weights-00001.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights-00001.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its checksum"):
        run(tmp_path / "out", tmp_path / "model")


def test_what_cannot_be_asked_for(make, tmp_path):
    make().save_checkpoint(tmp_path / "out")
    with pytest.raises(ConfigError, match="--to int8: expected one of checkpoint, universal, fp32, bf16, fp16"):
        run(tmp_path / "out", tmp_path / "model", "int8")
    with pytest.raises(ConfigError, match="is a checkpoint of zeroxide already"):
        run(tmp_path / "out", tmp_path / "model", "checkpoint")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(tmp_path / "nothing", tmp_path / "model")
    with pytest.raises(CheckpointError, match="try tag='global_step0'"):
        run(tmp_path / "out", tmp_path / "model", tag="other")
    (tmp_path / "empty" / "tag").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"is not a zeroxide checkpoint: it has no manifest\.json"):
        run(tmp_path / "empty", tmp_path / "model", tag="tag")


def test_the_command(make, tmp_path, capsys):
    written = made_up()
    write(tmp_path / "theirs", written, stage=2, world=2, extra={"more": {"tensor": torch.ones(20000)}})
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(tmp_path / "ours" / "global_step3")
    assert out[0].startswith("zeroxide: note: left out: client_state['more']")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "model"), "--to", "bf16", "--exclude-frozen"]) == 0
    assert load_file(tmp_path / "model" / "model.safetensors")["embed.weight"].dtype == torch.bfloat16
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "model"), "--to", "int8"]) == 2
    assert main(["convert", str(tmp_path / "gone"), str(tmp_path / "model")]) == 1
    assert main(["convert", str(tmp_path / "ours")]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("zeroxide: error: ")
