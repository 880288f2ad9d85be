"""Engines of several ranks that cannot be made leave nothing behind on any of them."""

from __future__ import annotations

import pytest
from launching import run_ranks

JOB = """
import json
import os
import sys

import torch
import torch.distributed as dist

import zeroxide
from zeroxide.engine import build as build_module
from zeroxide.errors import ModelError
from left_behind import differences, group, hooks_of, identities, resources, values
from models import build

transport, started = sys.argv[1], sys.argv[2] == "started"
torch.set_num_threads(1)
folder = os.environ["JOB_FOLDER"] + "/scratch"
os.makedirs(folder, exist_ok=True)
if started:
    dist.init_process_group("gloo")
disk = {"device": "nvme", "nvme_path": folder}
config = {
    "zero_optimization": {"stage": 3, "offload_param": disk, "offload_optimizer": disk},
    "zeroxide": {"threads": 1, "transport": transport},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "steps_per_print": None,
}


class Stop(Exception):
    pass


def stop(_):
    raise Stop


def made():
    torch.manual_seed(3)
    model = build("gpt")
    model.wte.weight.grad = torch.ones_like(model.wte.weight)
    return model


def trained(model):
    engine = zeroxide.initialize(model=model, config=config)[0]
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(int(os.environ["RANK"])))
    engine.backward(engine(ids))
    engine.step()
    found = {name: zeroxide.safe_get_full_fp32_param(param).clone() for name, param in model.named_parameters()}
    engine.destroy()
    return found


expected = trained(made())
steps = build_module.STEPS
names = [name for name, _ in steps]
if not started:
    steps = [each for each in steps if each[0] in ("watch", "optimizer", "hooks")]
model = made()
before = resources(), group(), hooks_of(model), identities(model)
plain = values(model)
for name, _ in steps:
    moved = names.index(name) >= names.index("weights")
    build_module.STEPS, real = (*build_module.STEPS[: names.index(name) + 1], ("stop", stop)), build_module.STEPS
    try:
        zeroxide.initialize(model=model, config=config)
    except Stop:
        pass
    else:
        raise AssertionError(name)
    build_module.STEPS = real
    if started:
        # A rank that is behind may still be about to close.
        dist.barrier()
        assert not os.listdir(folder), (name, os.listdir(folder))
    if moved:
        # Each rank has a part of the values: the model says so, and another one is made.
        assert (resources(), group()) == before[:2], name
        try:
            model.state_dict()
        except ModelError as error:
            assert "could not be made, after they had moved into it" in str(error), error
        else:
            raise AssertionError(f"after {name}: a model whose values have gone")
        model = made()
        before = *before[:2], hooks_of(model), identities(model)
    else:
        assert (resources(), group(), hooks_of(model), identities(model)) == before, name
        assert differences(plain, values(model)) == [], name
try:
    zeroxide.initialize(model=model, config=config, lr_scheduler=stop)
except Stop:
    # Whatever a user's code does, it does before the values move.
    assert (resources(), group(), hooks_of(model), identities(model)) == before
    assert differences(plain, values(model)) == []
assert differences(expected, trained(model)) == []
print("as before")
"""


@pytest.mark.parametrize(("transport", "started"), [("auto", "started"), ("collective", "not started")])
def test_a_step_that_fails_on_all_ranks_leaves_nothing_on_any(transport: str, started: str):
    # Catches: memory of the other ranks, threads, sockets, hooks or a process group that outlive a failed step, and
    # weights that move before everything that a user's code can make fail.
    for rank, result in enumerate(run_ranks(2, JOB, [transport, started], preamble="")):
        assert result.code == 0, f"rank {rank}: {result.out}\n{result.err}"
        assert "as before" in result.out
