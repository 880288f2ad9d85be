"""A small engine whose checkpoints the fault tests save, damage and load."""

from pathlib import Path

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.device.placement import spec
from zeroxide.errors import CheckpointError

PARTS = ("weights", "exp_avg", "exp_avg_sq")
CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")
"""Every system call by which a save changes something."""


class Model(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.items = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.norm = nn.BatchNorm1d(width, affine=False)

    def forward(self, x):
        for item in self.items:
            x = item(x).tanh()
        return self.norm(x).square().sum() + x.sum()


def engine_of(offload="none", seed=0, **more):
    torch.manual_seed(seed)
    model = more.pop("model", None) or Model()
    return zeroxide.initialize(model=model, lr=1e-2, offload=offload, dtype="bf16", **more)[0]


def train(engine, steps=1):
    for _ in range(steps):
        x = torch.rand(4, 8, generator=torch.Generator().manual_seed(engine.global_steps)).bfloat16()
        engine.backward(engine(x))
        engine.step()


def state(engine):
    found = {}
    core = engine.parts.core()
    for unit in engine.parts.units:
        for at, name in enumerate(unit.names):
            for part in PARTS:
                values = torch.empty(unit.shapes[at].numel())
                core.read_param(unit.index, at, part, 0, spec(values))
                found[name, part] = values.tolist()
            found[name, "updates"] = core.updates(unit.index, at)
    for name, buffer in engine.module.named_buffers():
        found[name] = buffer.tolist()
    found["steps"] = engine.global_steps
    found["rng"] = torch.get_rng_state().tolist()
    found["groups"] = engine.optimizer.hyperparameters()
    if engine.lr_scheduler is not None:
        found["schedule"] = engine.lr_scheduler.state_dict()
    return found


@pytest.fixture
def make(tmp_path):
    made = []

    def build(*args, **more):
        made.append(engine_of(*args, **more))
        return made[-1]

    yield build
    for engine in made:
        engine.destroy()


@pytest.fixture
def saved(make, tmp_path):
    """An engine, and the path of a checkpoint of it after three steps."""
    engine = make()
    train(engine, 3)
    return engine, engine.save_checkpoint(tmp_path / "out", client_state={"epoch": 1})


def refused(engine, folder, **more):
    """The one line with which loading is refused; the engine is as before."""
    before = state(engine)
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, **more)
    assert state(engine) == before
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line or Path(str(caught.value.path)).is_relative_to(folder)
    return line
