"""Checkpoints: the same bits whatever saved and whatever loads, files as others read them, clear refusals."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

import zeroxide
from zeroxide.checkpoint import cutting
from zeroxide.checkpoint.cutting import Tensor, cut_into_files
from zeroxide.checkpoint.plain import decode, encode
from zeroxide.checkpoint.stream import DTYPES, Entry, StreamWriter
from zeroxide.errors import CheckpointError
from zeroxide.optim import schedules
from zeroxide.zero.tensors import spec

VOCABULARY, WIDTH = 50, 32
FP32_BUFFERS = {"data_types": {"buffer_dtype": "fp32"}}
PARTS = ("weights", "exp_avg", "exp_avg_sq")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH + 1)
        self.down = nn.Linear(3 * WIDTH + 1, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tied embeddings, repeated blocks, batch statistics, buffers of several dtypes."""

    def __init__(self, tied=True, layers=3, vocabulary=VOCABULARY):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])
        self.seen = nn.BatchNorm1d(WIDTH, affine=False)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("turned", torch.rand(2, 3).t())
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        h = self.seen(h.flatten(0, 1).float()).to(h.dtype)
        return nn.functional.cross_entropy(self.head(h).float(), x.roll(1).flatten())


@pytest.fixture
def make(tmp_path):
    """Makes engines and destroys them at the end."""
    made = []

    def build(offload="none", fmt=None, *, dtype="bf16", model=None, seed=0, zeroxide_config=None, config=None, **more):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        model = model or Model()
        section = {"threads": 2, **({"format": fmt} if fmt else {}), **(zeroxide_config or {})}
        if offload == "nvme":
            offload = f"nvme:{tmp_path / 'scratch'}"
        engine, *_ = zeroxide.initialize(
            model=model,
            config={"zeroxide": section, **FP32_BUFFERS, **(config or {})},
            **{"lr": 1e-2, "weight_decay": 0.1, "gradient_clipping": 1.0, **more},
            offload=offload,
            dtype=dtype,
        )
        made.append(engine)
        return engine

    (tmp_path / "scratch").mkdir()
    yield build
    for engine in made:
        engine.destroy()


def train(engine, first, last):
    losses = []
    for step in range(first, last):
        x = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state(engine):
    """Every bit that training depends on, read whole."""
    found = {}
    core = engine._alive()
    for unit in engine._units:
        for at, name in enumerate(unit.names):
            for part in PARTS:
                values = torch.empty(unit.shapes[at].numel())
                core.read_param(unit.index, at, part, 0, spec(values))
                found[name, part] = values.view(torch.int32)
            found[name, "updates"] = core.updates(unit.index, at)
    for name, buffer in engine.module.named_buffers():
        found[name, "buffer"] = buffer.clone()
    found["groups"] = [dict(group) for group in engine.optimizer.hyperparameters()]
    found["counters"] = (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps)
    if engine.lr_scheduler is not None:
        found["scheduler"] = dict(engine.lr_scheduler.state_dict())
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype, key
            assert value.equal(other[key]), key
        else:
            assert value == other[key], key


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
    assert len(loader._units) > len(saver._units)
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
    from zeroxide.checkpoint import contents

    monkeypatch.setattr(contents.Staging.__init__, "__defaults__", (100,))
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


def assemble(path, part):
    """All tensors of a family of files, pieces put together, by the reference library."""
    found, cut = {}, {}
    for file in sorted(path.glob(f"{part}-*.safetensors")):
        for key, tensor in load_file(file).items():
            if "[" in key:
                name, _, span = key.partition("[")
                cut.setdefault(name, []).append((int(span.split(":")[0]), tensor))
            else:
                found[key] = tensor
    for name, pieces in cut.items():
        found[name] = torch.cat([tensor for _, tensor in sorted(pieces, key=lambda piece: piece[0])])
    return found


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
    assert manifest["version"] == 1
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


# What goes on ------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "WarmupLR": lambda o: schedules.WarmupLR(o, 0.0, 1e-2, 3),
    "WarmupCosineLR": lambda o: schedules.WarmupCosineLR(o, 6, warmup_num_steps=2),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on(make, tmp_path, name):
    def rates(engine, first, last):
        seen = []
        for step in range(first, last):
            train(engine, step, step + 1)
            seen.append((engine.get_lr(), [group["betas"] for group in engine.optimizer.param_groups]))
        return seen

    saver = make(lr_scheduler=SCHEDULES[name])
    seen = rates(saver, 0, 3)
    saver.save_checkpoint(tmp_path / "out")
    seen += rates(saver, 3, 6)
    assert len({str(each) for each in seen}) > 1
    loader = make(lr_scheduler=SCHEDULES[name], seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert rates(loader, 3, 6) == seen[3:]
    assert_same(state(loader), state(saver))


def test_a_plateau_schedule_goes_on(make, tmp_path):
    plateau = lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)  # noqa: E731
    saver, loader = make(lr_scheduler=plateau), make(lr_scheduler=plateau, seed=7)
    saver.save_checkpoint(tmp_path / "out")  # `best` is infinite
    loader.load_checkpoint(tmp_path / "out")
    assert loader.lr_scheduler.state_dict() == saver.lr_scheduler.state_dict()
    assert loader.lr_scheduler.best == float("inf")


def test_hyperparameters_changed_by_hand_go_on(make, tmp_path):
    saver = make()
    saver.optimizer.param_groups[0].update({"lr": 3e-4, "betas": (0.8, 0.95), "weight_decay": 0.3})
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert loader.optimizer.hyperparameters() == saver.optimizer.hyperparameters()
    assert train(loader, 2, 4) == train(saver, 2, 4)


def test_generators_go_on(make, tmp_path):
    engine = make()
    random.gauss(0, 1)
    np.random.standard_normal()
    engine.save_checkpoint(tmp_path / "out")
    draw = lambda: (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn())  # noqa: E731
    expected = draw()
    engine.load_checkpoint(tmp_path / "out")
    assert draw() == expected
    before = torch.get_rng_state()
    engine.load_checkpoint(tmp_path / "out", load_module_only=True)
    assert torch.get_rng_state().equal(before)


def test_accumulation_goes_on_at_a_boundary(make, tmp_path):
    saver = make(gradient_accumulation_steps=2)
    train(saver, 0, 6)
    assert (saver.global_steps, saver.micro_steps) == (3, 6)
    saver.save_checkpoint(tmp_path / "out")
    same, other = make(gradient_accumulation_steps=2), make(gradient_accumulation_steps=4)
    same.load_checkpoint(tmp_path / "out")
    other.load_checkpoint(tmp_path / "out")
    assert (same.global_steps, same.micro_steps) == (3, 6)
    train(other, 6, 9)
    assert other.global_steps == 3
    train(other, 9, 10)
    assert other.global_steps == 4


def test_gradients_of_before_are_not_used_after_loading(make, tmp_path):
    saver = make()
    train(saver, 0, 1)
    saver.save_checkpoint(tmp_path / "out")
    loader = make()
    loader.backward(loader(torch.zeros(2, 8, dtype=torch.long)))
    loader.load_checkpoint(tmp_path / "out")
    assert train(loader, 1, 3) == train(saver, 1, 3)
    assert_same(state(loader), state(saver))


def test_loading_between_forward_and_backward_leaves_a_usable_engine(make, tmp_path):
    saver = make("nvme", "split")
    train(saver, 0, 1)
    saver.save_checkpoint(tmp_path / "out")
    loader = make("nvme", "split", seed=7)
    pending = loader(torch.zeros(2, 8, dtype=torch.long))
    loader.load_checkpoint(tmp_path / "out")
    del pending
    assert train(loader, 1, 3) == train(saver, 1, 3)


# Parts of it -------------------------------------------------------------------------------------------------------


def test_weights_only(make, tmp_path):
    saver = make(lr_scheduler=SCHEDULES["StepLR"])
    train(saver, 0, 3)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(seed=7, lr_scheduler=SCHEDULES["StepLR"], lr=5e-3)
    train(loader, 0, 1)
    before = state(loader)
    loader.load_checkpoint(tmp_path / "out", load_module_only=True)
    there, after = state(saver), state(loader)
    for key, value in after.items():
        source = there if key[1] in ("weights", "buffer") else before
        assert_same({key: value}, {key: source[key]})


def test_weights_only_needs_no_other_files(make, tmp_path):
    saver = make()
    path = saver.save_checkpoint(tmp_path / "out")
    for file in path.glob("exp_avg*"):
        file.unlink()
    loader = make(seed=7)
    loader.load_checkpoint(tmp_path / "out", load_module_only=True)
    with pytest.raises(CheckpointError, match=r"exp_avg-00001\.safetensors is missing"):
        loader.load_checkpoint(tmp_path / "out")


def test_optimizer_without_schedule_keeps_the_new_schedule(make, tmp_path):
    saver = make(lr_scheduler=SCHEDULES["ExponentialLR"])
    train(saver, 0, 3)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(lr_scheduler=SCHEDULES["ExponentialLR"], lr=5e-3)
    loader.load_checkpoint(tmp_path / "out", load_lr_scheduler_states=False)
    assert loader.get_lr() == [5e-3]
    assert loader.lr_scheduler.last_epoch == 0
    assert loader.global_steps == 3
    moments = {key: value for key, value in state(saver).items() if key[1] in (*PARTS, "updates")}
    assert_same(moments, {key: state(loader)[key] for key in moments})


def test_schedule_without_optimizer(make, tmp_path):
    saver = make(lr_scheduler=SCHEDULES["ExponentialLR"])
    train(saver, 0, 3)
    saver.optimizer.param_groups[0]["weight_decay"] = 0.7
    saver.save_checkpoint(tmp_path / "out")
    loader = make(lr_scheduler=SCHEDULES["ExponentialLR"], seed=7)
    loader.load_checkpoint(tmp_path / "out", load_optimizer_states=False)
    assert loader.get_lr() == saver.get_lr()
    assert loader.optimizer.param_groups[0]["weight_decay"] == 0.1
    found = state(loader)
    assert not found["embed.weight", "exp_avg"].any()
    assert found["embed.weight", "updates"] == 0


def freeze(model):
    """Freezes some of a unit and all of another one."""
    for name, param in model.named_parameters():
        if name.startswith("blocks.0.up") or name.startswith("blocks.1"):
            param.requires_grad_(False)
    return model


@pytest.mark.parametrize("here", [("none", "fp32"), ("nvme", "split"), ("nvme", "fp32")], ids="-".join)
def test_frozen_parameters_that_were_left_out_stay(make, tmp_path, here, monkeypatch):
    from zeroxide.checkpoint import contents

    monkeypatch.setattr(contents.Staging.__init__, "__defaults__", (1000,))
    saver = make("nvme", "split", model=freeze(Model()))
    train(saver, 0, 2)
    path = saver.save_checkpoint(tmp_path / "out", exclude_frozen_parameters=True)
    with safe_open(path / "weights-00001.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith(("blocks.0.up", "blocks.1"))]  # noqa: SIM118
    torch.manual_seed(7)
    loader = make(*here, model=freeze(Model()), seed=8)
    before = state(loader)
    loader.load_checkpoint(tmp_path / "out")
    there, after = state(saver), state(loader)
    frozen = [name for name, param in freeze(Model()).named_parameters() if not param.requires_grad]
    assert len(frozen) == 8
    for key, value in after.items():
        source = before if key[0] in frozen and key[1] == "weights" else there
        assert_same({key: value}, {key: source[key]})
    assert not any(before[name, "weights"].equal(there[name, "weights"]) for name in frozen if "norm" not in name)
    # The live weights follow, not only what the core reports.
    losses = train(loader, 2, 4)
    assert losses != train(saver, 2, 4)


def test_frozen_parameters_are_stored_as_they_are_computed_with(make, tmp_path):
    saver = make("nvme", "split", model=freeze(Model()))
    losses = train(saver, 0, 2)
    path = saver.save_checkpoint(tmp_path / "out")
    weights, moments = assemble(path, "weights"), assemble(path, "exp_avg")
    expected = state(saver)
    assert weights["blocks.1.up.weight"].dtype == torch.bfloat16
    assert (
        weights["blocks.1.up.weight"]
        .float()
        .flatten()
        .view(torch.int32)
        .equal(expected["blocks.1.up.weight", "weights"])
    )
    assert weights["blocks.2.up.weight"].dtype == torch.float32
    assert "blocks.1.up.weight" not in moments
    loader = make("none", "fp32", model=freeze(Model()), seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), expected)
    losses += train(saver, 2, 4)
    assert train(loader, 2, 4) == losses[2:]


@pytest.mark.parametrize("here", ["none", "nvme"])
def test_parameters_unfrozen_since_start_with_zero_moments(make, tmp_path, here):
    saver = make("none", "split", model=freeze(Model()))
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(here, "split", seed=7)
    train(loader, 0, 1)
    loader.load_checkpoint(tmp_path / "out")
    there, here = state(saver), state(loader)
    for name in ("blocks.0.up.weight", "blocks.1.norm.weight"):
        assert here[name, "weights"].equal(there[name, "weights"])
        assert not here[name, "exp_avg"].any()
        assert not here[name, "exp_avg_sq"].any()
        assert here[name, "updates"] == 0
    assert here["blocks.2.up.weight", "exp_avg"].equal(there["blocks.2.up.weight", "exp_avg"])


class Changed(Model):
    """One parameter renamed, one added, one buffer added."""

    def __init__(self):
        super().__init__()
        self.blocks[1].more = nn.Linear(3, 3)
        self.blocks[0].renamed = self.blocks[0].down
        del self.blocks[0].down
        self.blocks[0].forward = lambda x: x + self.blocks[0].renamed(self.blocks[0].up(x))
        self.register_buffer("added", torch.ones(3))


@pytest.mark.parametrize("here", [("none", "fp32"), ("nvme", "split")], ids="-".join)
def test_names_that_differ(make, tmp_path, here):
    saver = make()
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(*here, model=Changed(), seed=7)
    x = torch.zeros(2, 8, dtype=torch.long)
    loader.backward(loader(x))
    loader.step()
    before = state(loader)
    with pytest.raises(CheckpointError) as caught:
        loader.load_checkpoint(tmp_path / "out")
    line = str(caught.value)
    assert "it lacks blocks.0.renamed.weight, blocks.0.renamed.bias, blocks.1.more.weight and 1 more" in line
    assert "it also holds blocks.0.down.weight, blocks.0.down.bias" in line
    assert "load_module_strict=False" in line
    assert_same(state(loader), before)
    loader.load_checkpoint(tmp_path / "out", load_module_strict=False)
    there, after = state(saver), state(loader)
    for key, value in after.items():
        source = there if key in there else before
        assert_same({key: value}, {key: source[key]})


def test_shapes_that_differ_are_refused_in_any_case(make, tmp_path):
    saver = make()
    saver.save_checkpoint(tmp_path / "out")
    model = Model()
    model.blocks[1].up = nn.Linear(WIDTH, 11)
    model.blocks[1].down = nn.Linear(11, WIDTH)
    loader = make(model=model)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"blocks\.1\.up\.weight \(97x32 there, 11x32 here\)"):
            loader.load_checkpoint(tmp_path / "out", load_module_strict=strict)


def test_other_buffers_are_refused(make, tmp_path):
    saver = make()
    saver.save_checkpoint(tmp_path / "out")
    model = Model()
    model.mask = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(CheckpointError, match=r"among the buffers.*mask \(torch.bool 3 there, torch.bool 4 here\)"):
        make(model=model).load_checkpoint(tmp_path / "out")
    model = Model()
    model.mask = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"mask \(torch.bool 3 there, torch.float32 3 here\)"):
        make(model=model).load_checkpoint(tmp_path / "out")
    model = Model()
    model.mask = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"mask \(torch.bool 3 there, torch.int32 3 here\)"):
        make(model=model).load_checkpoint(tmp_path / "out")


def test_floating_buffers_are_converted(make, tmp_path):
    saver = make()
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(seed=7, config={"data_types": {"buffer_dtype": "bf16"}})
    loader.load_checkpoint(tmp_path / "out")
    for name in ("running_mean", "running_var"):
        found = getattr(loader.module.seen, name)
        assert found.dtype == torch.bfloat16
        assert found.equal(getattr(saver.module.seen, name).bfloat16())


def test_another_depth_names_the_first_few(make, tmp_path):
    make().save_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"it also holds blocks\.1\.norm\.weight, .* and 9 more"):
        make(model=Model(layers=1)).load_checkpoint(tmp_path / "out")


def test_sharing_that_differs(make, tmp_path):
    make(model=Model(tied=True)).save_checkpoint(tmp_path / "tied")
    make(model=Model(tied=False)).save_checkpoint(tmp_path / "untied")
    tied, untied = make(seed=7), make(model=Model(tied=False), seed=7)
    with pytest.raises(CheckpointError, match=r"head\.weight \(one parameter with embed\.weight there, two here\)"):
        untied.load_checkpoint(tmp_path / "tied")
    with pytest.raises(CheckpointError, match=r"embed\.weight \(2 parameters there, one here\)"):
        tied.load_checkpoint(tmp_path / "untied")
    untied.load_checkpoint(tmp_path / "tied", load_module_strict=False)
    found = state(untied)
    assert found["embed.weight", "weights"].equal(found["head.weight", "weights"])


def test_a_shared_parameter_is_found_by_any_of_its_names(make, tmp_path):
    class Reordered(Model):
        def __init__(self):
            super().__init__()
            head = self.head
            embed = self.embed
            del self.head, self.embed
            blocks, seen = self.blocks, self.seen
            del self.blocks, self.seen
            self.head, self.blocks, self.seen, self.embed = head, blocks, seen, embed

    saver = make()
    train(saver, 0, 1)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(model=Reordered(), seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert state(loader)["head.weight", "exp_avg"].equal(state(saver)["embed.weight", "exp_avg"])


def groups_of(model, swap=False):
    decayed = [param for name, param in model.named_parameters() if param.ndim > 1]
    rest = [param for name, param in model.named_parameters() if param.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return groups[::-1] if swap else groups


def test_groups_must_be_the_same(make, tmp_path):
    model = Model()
    saver = make(model=model, model_parameters=groups_of(model))
    train(saver, 0, 1)
    saver.save_checkpoint(tmp_path / "out")
    model = Model()
    same = make(model=model, model_parameters=groups_of(model), seed=7)
    same.load_checkpoint(tmp_path / "out")
    assert_same(state(same), state(saver))
    model = Model()
    swapped = make(model=model, model_parameters=groups_of(model, swap=True))
    with pytest.raises(CheckpointError, match=r"other optimizer groups: embed\.weight \(group 0 there, 1 here\)"):
        swapped.load_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match="saved with 2 optimizer groups, this engine has 1"):
        make().load_checkpoint(tmp_path / "out")
    swapped.load_checkpoint(tmp_path / "out", load_module_only=True)


def test_schedules_must_be_the_same(make, tmp_path):
    make(lr_scheduler=SCHEDULES["StepLR"]).save_checkpoint(tmp_path / "with")
    make().save_checkpoint(tmp_path / "without")
    with pytest.raises(CheckpointError, match="lr_scheduler StepLR, this engine has ExponentialLR"):
        make(lr_scheduler=SCHEDULES["ExponentialLR"]).load_checkpoint(tmp_path / "with")
    with pytest.raises(CheckpointError, match="an lr_scheduler, this engine has none"):
        make().load_checkpoint(tmp_path / "with")
    with pytest.raises(CheckpointError, match="no lr_scheduler, this engine has one"):
        make(lr_scheduler=SCHEDULES["StepLR"]).load_checkpoint(tmp_path / "without")
    make().load_checkpoint(tmp_path / "with", load_lr_scheduler_states=False)


# Refusals ----------------------------------------------------------------------------------------------------------


def test_saving_within_accumulation_is_refused(make, tmp_path):
    engine = make(gradient_accumulation_steps=2)
    train(engine, 0, 1)
    with pytest.raises(CheckpointError, match="cannot be saved after micro-batch 1 of 2"):
        engine.save_checkpoint(tmp_path / "out")
    train(engine, 1, 2)
    engine.save_checkpoint(tmp_path / "out")
    engine.backward(engine(torch.zeros(2, 8, dtype=torch.long)))
    with pytest.raises(CheckpointError, match="gradients that no step has used"):
        engine.save_checkpoint(tmp_path / "out")
    engine.set_gradient_accumulation_boundary(False)
    engine.step()
    with pytest.raises(CheckpointError, match="gradients that no step has used"):
        engine.save_checkpoint(tmp_path / "out")
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    engine.save_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"a": [1, torch.ones(1)]}, r"client_state\['a'\]\[1\] is a torch.Tensor"),
        ({"a": {2: {1}}}, r"client_state\['a'\]\[2\] is a set"),
        ({b"k": 1}, "a key of client_state is a bytes"),
        ([1], "client_state must be a dict, got list"),
        ({"a": np.int64(3)}, r"client_state\['a'\] is a numpy.int64"),
    ],
)
def test_client_state_that_is_not_json_is_named(make, tmp_path, value, line):
    with pytest.raises(CheckpointError, match=line):
        make().save_checkpoint(tmp_path / "out", client_state=value)
    assert not (tmp_path / "out").exists()


def test_a_circular_client_state_is_refused(make, tmp_path):
    value = {}
    value["self"] = value
    with pytest.raises(CheckpointError, match="nested more than 100 deep"):
        make().save_checkpoint(tmp_path / "out", client_state=value)


def test_a_schedule_that_is_not_json_is_named(make, tmp_path):
    engine = make(lr_scheduler=SCHEDULES["StepLR"])
    engine.lr_scheduler.extra = open  # lands in its state_dict
    with pytest.raises(CheckpointError, match=r"StepLR.state_dict\(\)\['extra'\] is a builtin_function_or_method"):
        engine.save_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("tag", ["", "a/b", "..", ".hidden", "latest", "a\nb", "x" * 300])
def test_tags_that_are_no_names_are_refused(make, tmp_path, tag):
    engine = make()
    for act in (lambda: engine.save_checkpoint(tmp_path / "out", tag), lambda: engine.load_checkpoint(tmp_path, tag)):
        with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
            act()


def test_a_directory_that_is_no_checkpoint_is_not_replaced(make, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists and is not a zeroxide checkpoint"):
        make().save_checkpoint(tmp_path, "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.text() | st.sampled_from(["$tuple", "$dict"]) | st.integers(), inner)
            | st.lists(st.integers()).map(Counter)
        ),
        max_leaves=20,
    )
)
def test_plain_values_survive_json(value):
    def same(one, other):
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert list(one) == list(other)
            for (key, item), (other_key, other_item) in zip(one.items(), other.items(), strict=True):
                same(key, other_key)
                same(item, other_item)
        elif isinstance(one, list | tuple):
            assert len(one) == len(other)
            for pair in zip(one, other, strict=True):
                same(*pair)
        else:
            assert repr(one) == repr(other)

    same(decode(json.loads(json.dumps(encode(value, "value")))), value)


# The writer --------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(SHAPES, st.sampled_from(sorted(DTYPES))), max_size=6),
    st.integers(1, 40),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=5),
)
def test_written_files_are_read_by_the_reference_library(tmp_path_factory, tensors, chunk, suffix):
    path = tmp_path_factory.mktemp("stream") / "file.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = sorted(tensors, key=lambda pair: -DTYPES[pair[1]].itemsize)
    values = []
    for shape, name in tensors:
        dtype = DTYPES[name]
        numel = int(np.prod(shape, dtype=int))
        raw = torch.randint(0, 2, (numel * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        values.append(raw.view(dtype).view(shape) if numel else torch.empty(shape, dtype=dtype))
    entries = [Entry(f"{at}{suffix}", value.dtype, tuple(value.shape)) for at, value in enumerate(values)]
    with StreamWriter(path, entries, {"format": "pt"}) as writer:
        for value in values:
            for piece in value.flatten().split(chunk):
                writer.write(piece)
        writer.finish()
    assert writer.bytes == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {entry.key for entry in entries}
        for entry, value in zip(entries, values, strict=True):
            found = file.get_tensor(entry.key)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert found.flatten().view(torch.uint8).equal(value.flatten().view(torch.uint8))


def test_a_writer_that_was_not_fed_everything_does_not_finish(tmp_path):
    entries = [Entry("a", torch.float32, (3,)), Entry("b", torch.bfloat16, (2,))]
    with StreamWriter(tmp_path / "one", entries, {}) as writer:
        writer.write(torch.ones(3))
        with pytest.raises(AssertionError, match="b is not complete"):
            writer.finish()
    with StreamWriter(tmp_path / "two", entries, {}) as writer:
        with pytest.raises(AssertionError, match="a has 12 bytes left"):
            writer.write(torch.ones(4))
        with pytest.raises(AssertionError, match=r"a takes torch\.float32"):
            writer.write(torch.ones(2, dtype=torch.bfloat16))


def test_short_writes_go_on(tmp_path, monkeypatch):
    import os

    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: max(1, len(data) // 3)]))
    with StreamWriter(tmp_path / "file", [Entry("a", torch.float32, (1000,))], {}) as writer:
        writer.write(torch.arange(1000.0))
        writer.finish()
    assert load_file(tmp_path / "file")["a"].equal(torch.arange(1000.0))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(SHAPES, st.sampled_from(["F32", "BF16", "I64", "BOOL"])), max_size=8),
    st.integers(1, 300),
    st.booleans(),
)
def test_cutting_covers_every_element_once(tensors, limit, pieces):
    tensors = [Tensor(f"t{at}", DTYPES[name], shape) for at, (shape, name) in enumerate(tensors)]
    files = cut_into_files(tensors, limit, pieces=pieces)
    seen = {tensor.name: [] for tensor in tensors}
    for cuts in files:
        assert cuts
        size = sum(cut.entry.bytes for cut in cuts)
        assert size <= limit or len([cut for cut in cuts if cut.entry.bytes]) == 1
        if pieces and limit >= 8:
            assert size <= limit
        widths = [cut.tensor.dtype.itemsize for cut in cuts]
        assert widths == sorted(widths, reverse=True)
        for cut in cuts:
            seen[cut.tensor.name] += range(cut.start, cut.start + cut.count)
    assert seen == {tensor.name: list(range(tensor.numel)) for tensor in tensors}


# Memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch, zeroxide
from torch import nn
from pathlib import Path

def hwm():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

class Source:
    def fill(self, tensors, modules):
        for tensor in tensors.values():
            tensor.fill_(0.25)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.ModuleList([nn.Linear(2048, 2048, bias=False) for _ in range(12)])
    def forward(self, x):
        for item in self.items:
            x = item(x)
        return x.sum()

with torch.device("meta"):
    model = Model()
folder = Path(sys.argv[1])
engine, *_ = zeroxide.initialize(model=model, lr=1e-3, offload=f"nvme:{folder}", dtype="bf16", weights=Source(),
                                 config={"zeroxide": {"staging_bytes": 16 << 20, "tile_bytes": 1 << 20}})
engine.backward(engine(torch.ones(1, 2048, dtype=torch.bfloat16)))
engine.step()
import zeroxide.checkpoint.save, zeroxide.checkpoint.load, zeroxide.checkpoint.export
for act in ("save_checkpoint", "save_16bit_model", "load_checkpoint"):
    Path("/proc/self/clear_refs").write_text("5")
    before = hwm()
    getattr(engine, act)(folder / "out")
    print(act, hwm() - before)
engine.destroy()
"""


def test_memory_stays_small(tmp_path):
    """48 M parameters: 576 MB in files. Loading may also hold one part of one unit (16 MiB), as the core fills it."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines() if " " in line}
    assert grown["save_checkpoint"] < 16, grown
    assert grown["save_16bit_model"] < 16, grown
    assert grown["load_checkpoint"] < 16 + 16, grown


# Exported models ---------------------------------------------------------------------------------------------------


def hugging_face(kind):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=3, n_head=2))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("offload", ["none", "nvme"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("limit", [1 << 31, 9000])
def test_transformers_loads_what_was_exported(make, tmp_path, monkeypatch, kind, offload, dtype, limit):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(cutting, "FILE_BYTES", limit)
    torch.manual_seed(0)
    engine = make(offload, dtype=dtype, model=hugging_face(kind).eval())
    x = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        engine.backward(engine(input_ids=x, labels=x).loss)
        engine.step()
    folder = tmp_path / "model"
    path = engine.save_16bit_model(folder)
    sharded = limit == 9000
    assert path.name == ("model.safetensors.index.json" if sharded else "model.safetensors")
    names = {file.name for file in folder.iterdir()}
    if sharded:
        assert len(names) > 4
        index = json.loads(path.read_text())
        keys = {}
        for name in set(index["weight_map"].values()):
            with safe_open(folder / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                keys.update(dict.fromkeys(file.keys(), name))
        assert keys == index["weight_map"]
        total = sum(tensor.nbytes for name in set(keys.values()) for tensor in load_file(folder / name).values())
        assert index["metadata"]["total_size"] == total
    else:
        assert names == {"model.safetensors"}
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert ("lm_head.weight" in stored) == (kind == "llama")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float32}

    engine.module.config.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=next(iter(stored.values())).dtype, output_loading_info=True, attn_implementation="sdpa"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert loaded.eval()(input_ids=x).logits.equal(engine(input_ids=x).logits)


def test_exported_bits_are_the_live_ones(make, tmp_path):
    """Trained until many weights lie between two bf16 numbers; the export must round them as the live ones were."""
    engine = make("nvme", "fp32", model=freeze(Model()))
    train(engine, 0, 5)
    path = engine.save_16bit_model(tmp_path / "model")
    stored = load_file(path)
    core = engine._alive()
    for unit in engine._units:
        core.gather(unit.index)
        unit.show()
        for name, param in zip(unit.names, unit.params, strict=True):
            assert param.equal(stored.pop(name)), name
        unit.hide()
        core.release(unit.index)
    assert stored.keys() == {
        "mask",
        "empty",
        "turned",
        "seen.running_mean",
        "seen.running_var",
        "seen.num_batches_tracked",
    }
    assert stored["seen.num_batches_tracked"].item() == 5
    assert stored["seen.running_mean"].equal(engine.module.seen.running_mean)


def test_exact_ties_are_exported_as_they_are_computed_with(make, tmp_path):
    model = Model()
    with torch.no_grad():
        model.blocks[0].up.weight.fill_(1 + 2**-8)  # halfway between two bf16 numbers
    engine = make("none", "fp32", model=model)
    stored = load_file(engine.save_16bit_model(tmp_path))["blocks.0.up.weight"]
    assert (stored == 1 + 2**-7).all()
    unit = next(unit for unit in engine._units if "blocks.0.up.weight" in unit.names)
    engine._gatherer.gather(unit)
    assert engine.module.blocks[0].up.weight.equal(stored)
    engine._gatherer.release(unit)


def test_exports_replace_one_another(make, tmp_path, monkeypatch):
    engine = make()
    (tmp_path / "config.json").write_text("{}")
    engine.save_16bit_model(tmp_path)
    monkeypatch.setattr(cutting, "FILE_BYTES", 9000)
    engine.save_16bit_model(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    many = {path.name for path in tmp_path.glob("model-*")}
    monkeypatch.setattr(cutting, "FILE_BYTES", 20000)
    index = engine.save_16bit_model(tmp_path)
    few = {path.name for path in tmp_path.glob("model-*")}
    assert 1 < len(few) < len(many)
    assert few == set(json.loads(index.read_text())["weight_map"].values())
    monkeypatch.undo()
    engine.save_16bit_model(tmp_path)
    engine.save_16bit_model(tmp_path, "other.safetensors")
    (tmp_path / "scratch").rmdir()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "other.safetensors"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a/b.safetensors", ".safetensors", ""])
def test_other_names_for_exports_are_refused(make, tmp_path, name):
    from zeroxide.errors import ConfigError

    with pytest.raises(ConfigError, match=r"expected one file name that ends in \.safetensors"):
        make().save_16bit_model(tmp_path, name)


def test_paths_may_be_strings(make, tmp_path):
    engine = make()
    assert engine.save_checkpoint(str(tmp_path / "out")) == Path(tmp_path / "out" / "global_step0")
    assert engine.load_checkpoint(str(tmp_path / "out"))[1] == {}
