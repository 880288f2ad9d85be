"""DeepSpeed's universal checkpoints, in both directions."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import universal_files
from checkpointing import assemble
from deepspeed_files import PARTS, made_up, write
from running import started
from torch import nn

from zeroxide.checkpoint.convert.convert import convert, read_weights
from zeroxide.cli import main
from zeroxide.errors import CheckpointError, ConfigError

FILES = universal_files.FILES


def run(source, target, to=None, tag=None, *, frozen=True):
    return convert(Path(source), Path(target), to, tag, include_frozen=frozen)


def check_ours(path, written):
    """Every element, and everything else that a checkpoint says."""
    for part in PARTS:
        found = assemble(path, part)
        expected = {name: value for (name, of), value in written.values.items() if of == part}
        expected |= written.frozen if part == "weights" else {}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert found[name].reshape(value.shape).equal(value), (part, name)
    buffers = assemble(path, "buffers")
    assert buffers.keys() == written.buffers.keys()
    for name, value in buffers.items():
        assert value.reshape(written.buffers[name].shape).equal(written.buffers[name])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["client_state"] == {"epoch": 1.5}
    assert manifest["scheduler"] == {"kind": "WarmupLR", "state": {"last_batch_iteration": 2}}
    assert [group["hyperparameters"]["lr"] for group in manifest["groups"]] == [0.01, 0.02]
    assert manifest["precision"] == "bf16"
    for param in manifest["parameters"]:
        name = param["names"][0]
        group = next((number for number, names in enumerate(written.groups) if name in names), None)
        assert (param["group"], param["updates"]) == (group, 0 if group is None else 3), name
    assert manifest["parameters"][0]["names"] == ["embed.weight", "head.weight"]
    return manifest


# --- into zeroxide's -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("where", ["latest", "tag", "itself"])
def test_every_element_arrives(tmp_path, stage, where):
    written = made_up()
    universal_files.write(tmp_path / "theirs", written, stage=stage)
    source = tmp_path / "theirs" / ("global_step3" if where == "itself" else "")
    path, notes = run(source, tmp_path / "ours", tag="global_step3" if where == "tag" else None)
    assert (path, notes) == (tmp_path / "ours" / "global_step3", [])
    manifest = check_ours(path, written)
    assert manifest["counters"] == {"global_steps": 3, "global_samples": 24, "micro_steps": 6, "skipped_steps": 1}
    weights = read_weights(source, None, torch.float32, include_frozen=False)
    assert all(weights[name].equal(value) for (name, part), value in written.values.items() if part == "weights")


def without(target, name, *parts):
    for part in parts:
        (target / "zero" / name / f"{part}.pt").unlink()


def updates_of(path):
    return {
        each["names"][0]: each["updates"] for each in json.loads((path / "manifest.json").read_text())["parameters"]
    }


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_that_were_never_made_are_zero(tmp_path, stage):
    """DeepSpeed writes none for a parameter that had no gradient."""
    written = made_up()
    target = universal_files.write(tmp_path / "theirs", written, stage=stage)
    names = ["blocks.0.up.bias", "blocks.0.scale"]
    for name in names:
        without(target, name, "exp_avg", "exp_avg_sq", *(["step"] if stage == 1 else []))
    path, notes = run(tmp_path / "theirs", tmp_path / "ours")
    assert notes == [
        "2 parameters have no moments in the checkpoint (first blocks.0.scale): moments and the count of updates begin "
        "at zero"
    ]
    trained = {name for name, _ in written.values}
    assert updates_of(path) == {name: 3 * (name not in names) for name in trained} | dict.fromkeys(written.frozen, 0)
    for part in ("exp_avg", "exp_avg_sq"):
        found = assemble(path, part)
        assert found.keys() == trained
        assert not any(found[name].any() for name in names)
        assert found["norm.weight"].equal(written.values["norm.weight", part])


def test_a_step_of_zero_needs_no_moments(tmp_path):
    target = universal_files.write(tmp_path / "theirs", made_up(), stage=1)
    without(target, "norm.weight", "exp_avg", "exp_avg_sq")
    torch.save(0, target / "zero" / "norm.weight" / "step.pt")
    path, notes = run(tmp_path / "theirs", tmp_path / "ours")
    assert [note.partition(":")[0] for note in notes] == [
        "1 parameter has no moments in the checkpoint (first norm.weight)"
    ]
    assert updates_of(path)["norm.weight"] == 0


def test_a_step_that_nobody_has_is_told(tmp_path):
    target = universal_files.write(tmp_path / "theirs", made_up(), stage=1)
    without(target, "norm.weight", "step")
    path, notes = run(tmp_path / "theirs", tmp_path / "ours")
    assert notes == [
        "1 parameter has no step in the checkpoint (first norm.weight): the count of updates begins at zero"
    ]
    assert updates_of(path)["norm.weight"] == 0


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("lost", [("exp_avg",), ("exp_avg_sq",), ("exp_avg", "exp_avg_sq")], ids=" ".join)
def test_lost_moments_are_an_error(tmp_path, capsys, stage, lost):
    """One of two, and, where each parameter has its step, both. Weights alone can be had all the same."""
    written = made_up()
    target = universal_files.write(tmp_path / "theirs", written, stage=stage)
    for name in {name for name, _ in written.values}:
        without(target, name, *lost)
    if len(lost) == 2 and stage == 3:
        path, notes = run(tmp_path / "theirs", tmp_path / "ours")
        assert [note.partition(" (")[0] for note in notes] == ["7 parameters have no moments in the checkpoint"]
        assert set(updates_of(path).values()) == {0}
    else:
        assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 1
        assert f"{lost[0]}.pt of embed.weight is missing" in capsys.readouterr().err
    weights = read_weights(tmp_path / "theirs", None, torch.float32, include_frozen=False)
    assert all(weights[name].equal(value) for (name, part), value in written.values.items() if part == "weights")


@pytest.mark.parametrize("stage", [1, 3])
def test_another_view_of_a_parameter_that_deepspeed_cuts(tmp_path, stage):
    written = made_up()
    target = universal_files.write(tmp_path / "theirs", written, stage=stage)
    for part, file in FILES.items():
        value = written.values["blocks.0.up.weight", part]
        torch.save(
            {"sub_param_shape": [7, 5], "param": value.view(5, 7)}, target / f"zero/blocks.0.up.weight/{file}.pt"
        )
    check_ours(run(tmp_path / "theirs", tmp_path / "ours")[0], written)


def missing(name):
    return lambda target: (target / name).unlink()


def other(value, name="zero/norm.weight/fp32.pt"):
    return lambda target: torch.save(value, target / name)


def step(value):
    return other(value, "zero/norm.weight/step.pt")


def renamed(target):
    shutil.copy(target / "mp_rank_00_model_states.pt", target / "mp_rank_01_model_states.pt")


def climbing(target):
    states = torch.load(target / "mp_rank_00_model_states.pt", weights_only=True)
    states["param_shapes"] = [OrderedDict({"../../outside": torch.Size([1])})]
    torch.save(states, target / "mp_rank_00_model_states.pt")


def stepped(count):
    """A step that is with the optimizer, as from stage 3."""

    def damage(target):
        without(target, "norm.weight", "step")
        torch.save({"param_groups": [{"step": count}, {}]}, target / "zero" / "optimizer_state.pt")

    return damage


class Runs:
    """What a pickle of this would run."""

    def __reduce__(self):
        return (os.mkdir, ("was-run",))


DAMAGE = [
    (missing("zero/norm.weight/fp32.pt"), "fp32.pt of norm.weight is missing"),
    (missing("zero/optimizer_state.pt"), "optimizer_state.pt is missing"),
    (missing("mp_rank_00_model_states.pt"), "model_states.pt is missing"),
    (other({"param": torch.zeros(3)}), r"fp32.pt of norm.weight: .* of shape \(1,\), got float32 of shape \(3,\)"),
    (other({"param": "x"}), "expected fp32, bf16 or fp16 of shape .*, got str"),
    (other({"param": torch.zeros(1, dtype=torch.int64)}), r"got int64 of shape \(1,\)"),
    (other({"param": torch.zeros(1, dtype=torch.complex64)}), "got complex64"),
    (other({"param": torch.ones(1).to_sparse()}), "got a tensor that has layout sparse_coo"),
    (other({"param": torch.ones(1, device="meta")}), "got a tensor without values"),
    (other({"param": torch.zeros(5, 7)}, "zero/blocks.0.up.weight/fp32.pt"), r"of shape \(7, 5\), got .* \(5, 7\)"),
    (other({"param": torch.zeros(35)}, "zero/blocks.0.up.weight/exp_avg.pt"), r"exp_avg.pt of blocks.0.up.*\(35,\)"),
    (other(torch.zeros(35), "zero/blocks.0.up.weight/fp32.pt"), r"of shape \(7, 5\), got float32 of shape \(35,\)"),
    (other({"param": torch.zeros(3), "sub_param_shape": [1]}), r"got float32 of shape \(3,\)"),
    (step(torch.tensor(-5.0)), "step.pt of norm.weight: expected a whole number of updates, got -5.0"),
    (step(-5), "updates, got -5"),
    (step(2.5), "updates, got 2.5"),
    (step(float("inf")), "updates, got inf"),
    (step(torch.tensor(float("nan"))), "updates, got nan"),
    (step(torch.ones(2)), "updates, got Tensor"),
    (step(torch.ones(1).to_sparse()), "updates, got Tensor"),
    (step({"step": 3}), "updates, got dict"),
    (other({"param": torch.zeros(1), "is_expert_param": True}), "it has experts"),
    (other({"cat_dim": 0}), "not laid out as"),
    (other(Runs()), "it asks for posix.mkdir"),
    (renamed, "of several model-parallel ranks"),
    (climbing, "is no name of a parameter"),
    (stepped(-3), "the step in optimizer_state.pt: expected a whole number of updates, got -3"),
]


@pytest.mark.parametrize(("damage", "line"), DAMAGE, ids=[line for _, line in DAMAGE])
def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, damage, line):
    monkeypatch.chdir(tmp_path)
    damage(universal_files.write(tmp_path / "theirs", made_up(), stage=1))
    with pytest.raises(CheckpointError, match=line) as caught:
        run(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "ours").glob("*/manifest.json"))
    assert not (tmp_path / "was-run").exists()


# --- from zeroxide's -------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of zeroxide's with everything that `made_up` has."""
    write(tmp_path / "zero", made_up(), stage=2, world=2)
    return run(tmp_path / "zero", tmp_path / "ours")[0].parent


def load(path):
    return torch.load(path, weights_only=True)


def test_what_is_written_is_as_deepspeed_reads_it(ours, tmp_path, capsys):
    """The files, keys and shapes that DeepSpeed's optimizers ask for, at stages 1 and 2 and at stage 3."""
    written = made_up()
    assert main(["convert", str(ours), str(tmp_path / "theirs"), "--to", "universal", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    target = tmp_path / "theirs" / "global_step3"
    assert told == {"path": str(target), "notes": []}
    assert (tmp_path / "theirs" / "latest_universal").read_text() == "global_step3"
    assert sorted(each.name for each in (tmp_path / "theirs").iterdir()) == ["global_step3", "latest_universal"]
    names = {name for name, _ in written.values}
    assert {each.name for each in (target / "zero").iterdir()} == names | {"optimizer_state.pt"}
    for (name, part), value in written.values.items():
        found = load(target / "zero" / name / f"{FILES[part]}.pt")
        assert found["cat_dim"] == 0
        assert found["param"].dtype == torch.float32
        assert found["param"].shape == value.shape
        assert found["param"].equal(value)
    assert all(float(load(target / "zero" / name / "step.pt")) == 3 for name in names)
    state = load(target / "zero" / "optimizer_state.pt")
    assert state["ds_version"] == "0.19.8"
    inner = state["optimizer_state_dict"]
    assert inner["param_groups"] == state["param_groups"]
    assert float(inner["state"][0]["step"]) == 3
    assert [(each["lr"], each["betas"], each["weight_decay"], each["params"]) for each in state["param_groups"]] == [
        (0.01, (0.9, 0.99), 0.0, [0]),
        (0.02, (0.9, 0.99), 0.1, [1]),
    ]
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        states = load(target / name)
        assert [list(each) for each in states["param_shapes"]] == written.groups
        assert (states["global_steps"], states["skipped_steps"], states["dp_world_size"]) == (3, 1, 1)
        assert states["lr_scheduler"] == {"last_batch_iteration": 2}
        assert states["shared_params"] == written.shared
        assert states["epoch"] == 1.5
        assert states["universal_checkpoint_info"] == {"universal_checkpoint_version": 0.4}
        for key, value in (written.frozen | written.buffers).items():
            assert states["module"][key].equal(value)


def test_frozen_weights_can_be_left_out(ours, tmp_path):
    path, _ = run(ours, tmp_path / "theirs", "universal", frozen=False)
    states = load(path / "mp_rank_00_model_states.pt")
    assert states["frozen_param_shapes"] == {}
    assert not states["module"].keys() & made_up().frozen.keys()


def test_there_and_back_nothing_changes(ours, tmp_path):
    path, _ = run(ours, tmp_path / "theirs", "universal")
    again, notes = run(path.parent, tmp_path / "again")
    assert notes == []
    check_ours(again, made_up())


def test_deepspeeds_zero_checkpoints_become_universal_ones_as_well(tmp_path):
    write(tmp_path / "zero", made_up(), stage=3, world=3)
    path, _ = run(tmp_path / "zero", tmp_path / "theirs", "universal")
    assert load(path / "zero" / "embed.weight" / "fp32.pt")["param"].shape == (50, 3)
    check_ours(run(path, tmp_path / "ours")[0], made_up())


def test_what_is_there_already_is_left_alone(ours, tmp_path):
    run(ours, tmp_path / "theirs", "universal")
    before = (tmp_path / "theirs" / "global_step3" / "zero" / "optimizer_state.pt").read_bytes()
    with pytest.raises(CheckpointError, match="exists: give another directory"):
        run(ours, tmp_path / "theirs", "universal")
    assert (tmp_path / "theirs" / "global_step3" / "zero" / "optimizer_state.pt").read_bytes() == before
    with pytest.raises(ConfigError, match="is a checkpoint of that form already: give --to checkpoint, fp32"):
        run(tmp_path / "theirs", tmp_path / "x", "universal")


def test_a_failure_leaves_nothing(ours, tmp_path, monkeypatch):
    def full(value, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Exception, match="No space left"):
        run(ours, tmp_path / "theirs", "universal")
    assert list((tmp_path / "theirs").iterdir()) == []


def test_state_of_other_optimizers_is_refused(tmp_path):
    config = {"optimizer": {"type": "Lion", "params": {"lr": 0.01}}, "gradient_clipping": 0}
    with started(nn.Linear(4, 2), config=config) as engine:
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        engine.save_checkpoint(str(tmp_path / "ours"), tag="lion")
    with pytest.raises(CheckpointError, match="universal checkpoints are written of Adam's alone"):
        run(tmp_path / "ours", tmp_path / "theirs", "universal")
    assert not (tmp_path / "theirs").exists()


def test_training_goes_on_with_the_same_bits_after_both_ways(tmp_path):
    """Catches: an update count, a rate or a moment that is lost on the way."""
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}, "bf16": {"enabled": True}}

    def step(engine, count):
        for number in range(count):
            torch.manual_seed(number)
            engine.backward(engine(torch.randn(3, 4).bfloat16()).float().square().sum())
            engine.step()
        return {name: value.clone() for name, value in engine.module_state_dict().items()}

    torch.manual_seed(0)
    with started(nn.Linear(4, 2), config=config) as engine:
        step(engine, 3)
        engine.save_checkpoint(str(tmp_path / "ours"), tag="t")
        expected = step(engine, 2)
    run(tmp_path / "ours", tmp_path / "theirs", "universal")
    run(tmp_path / "theirs", tmp_path / "again")
    with started(nn.Linear(4, 2), config=config) as engine:
        assert engine.load_checkpoint(str(tmp_path / "again"))[0] is not None
        found = step(engine, 2)
    assert all(found[name].equal(value) for name, value in expected.items())
