"""A model that was compiled before it came, as a whole or in parts, is saved as what it is and loads both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from running import Mode, config_of, started
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import zeroxide
from zeroxide.checkpoint.convert.convert import convert
from zeroxide.checkpoint.format.commit import write_new
from zeroxide.checkpoint.format.manifest import Manifest, read_manifest
from zeroxide.errors import ModelError
from zeroxide.zero.names import plain_name


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
        self.out = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.out.weight

    def forward(self, x):
        for block in self.h:
            x = block(x)
        return self.tied(torch.tanh(self.out(x)))


def whole(model):
    return torch.compile(model, backend="eager")


def parts(model):
    model.h[1] = torch.compile(model.h[1], backend="eager")
    model.out = torch.compile(model.out, backend="eager")
    return model


def twice(model):
    return whole(parts(model))


SHAPES = {"whole": whole, "parts": parts, "twice": twice}


@pytest.fixture(params=[0, 3])
def config(request, tmp_path):
    config = config_of(Mode(), tmp_path, "fp32")
    config["zero_optimization"] |= {"stage": request.param}
    if request.param < 3:
        del config["zero_optimization"]["offload_param"]
    return config


def made(seed=0):
    torch.manual_seed(seed)
    return Net()


def train(engine, steps=2):
    for step in range(steps):
        x = torch.rand(8, 4, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x).square().sum())
        engine.step()


def test_names_lose_what_compiling_adds():
    """Catches: one level only, and names that merely contain the word."""
    assert plain_name("_orig_mod.h.0._orig_mod.weight") == "h.0.weight"
    assert plain_name("a_orig_mod.weight") == "a_orig_mod.weight"
    assert plain_name("_orig_mod_2.w") == "_orig_mod_2.w"


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_has_the_names_of_the_model(shape, config, tmp_path):
    """Oracle: the names of the plain model, and the weights that a plain model gets."""
    plain = made()
    with started(plain, config=copy.deepcopy(config)) as engine:
        train(engine)
        expected = {name: value.clone() for name, value in plain.state_dict().items()}
        engine.save_checkpoint(tmp_path / "plain", tag="t")
        engine.save_16bit_model(tmp_path / "folder")
    model = SHAPES[shape](made())
    with started(model, config=config) as engine:
        train(engine)
        state = engine.module_state_dict()
        engine.save_16bit_model(tmp_path / "compiled folder")
        engine.save_checkpoint(tmp_path / "compiled", tag="t")
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("folder", "compiled folder"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    convert(tmp_path / "compiled", tmp_path / "converted", "fp32", None, include_frozen=True)
    with safe_open(tmp_path / "converted" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(one)
    for there, seed, wrap in (("compiled", 3, lambda each: each), ("plain", 4, SHAPES[shape])):
        again = wrap(made(seed))
        with started(again, config=copy.deepcopy(config)) as engine:
            engine.load_checkpoint(tmp_path / there)
            for name, value in engine.module_state_dict().items():
                assert torch.equal(value, expected[name]), name
            engine.load_module_state_dict({name: value + 1 for name, value in expected.items()})
            exact = {
                plain_name(name): zeroxide.safe_get_full_fp32_param(each) for name, each in again.named_parameters()
            }
            assert torch.equal(exact["h.1.0.weight"], expected["h.1.0.weight"] + 1)


def test_names_with_the_prefix_load_too(config, tmp_path):
    """Checkpoints and dicts from before, or of torch itself, have the prefix."""
    with started(made(), config=copy.deepcopy(config)) as engine:
        train(engine)
        expected = {name: value.clone() for name, value in engine.module.state_dict().items()}
        path = engine.save_checkpoint(tmp_path / "c", tag="t")
    manifest = read_manifest(path).model_dump()
    for parameter in manifest["parameters"]:
        parameter["names"] = [f"_orig_mod.{name}" for name in parameter["names"]]
    for buffer in manifest["buffers"]:
        buffer["name"] = f"_orig_mod.{buffer['name']}"
    write_manifest(path / "manifest.json", manifest)
    for model in (made(1), whole(made(2))):
        with started(model, config=copy.deepcopy(config)) as engine:
            engine.load_checkpoint(tmp_path / "c")
            for name, value in engine.module_state_dict().items():
                assert torch.equal(value, expected[name]), name
            engine.load_module_state_dict({f"_orig_mod.{name}": value + 1 for name, value in expected.items()})
            assert torch.equal(engine.module_state_dict()["out.bias"], expected["out.bias"] + 1)
            with pytest.raises(ModelError, match=r"out\.bias is missing"):
                engine.load_module_state_dict({name: value for name, value in expected.items() if name != "out.bias"})
    convert(tmp_path / "c", tmp_path / "converted", "fp32", None, include_frozen=True)
    assert set(load_file(tmp_path / "converted" / "model.safetensors")) == set(expected) - {"tied.weight"}


def write_manifest(path, manifest):
    path.unlink()
    write_new(path, Manifest(**manifest).text())
