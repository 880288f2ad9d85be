"""What a model is after its engine was destroyed."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from models import build
from running import Mode, config_of, started
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.errors import ConfigError, DataError, ModelError


def ids(seed=0):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def settings(folder, stage, optimizer="none", dtype="fp32"):
    config = config_of(Mode("none", optimizer), folder, dtype)
    config["zero_optimization"] |= {"stage": stage}
    return config


def trained(engine, seed=0):
    engine.backward(engine(ids(seed)))
    engine.step()
    return {name: param.detach().clone() for name, param in engine.module.named_parameters() if param.numel()}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_visible_parameters_stay_and_are_plain_ones(stage, dtype, tmp_path):
    """Catches: views that outlive their memory, a handle that stays, tied weights that part."""
    model = build("gpt")
    with started(model, config=settings(tmp_path, stage, dtype=dtype)) as engine:
        last = trained(engine)
        places = {param.data_ptr() for param in model.parameters()}
    memory = weakref.ref(engine)
    del engine
    gc.collect()
    assert memory() is None, "the model must not keep its engine alive"
    assert model.head.weight is model.wte.weight
    for name, param in model.named_parameters():
        assert type(param) is nn.Parameter, name
        assert torch.equal(param, last[name]), name
        assert param.data_ptr() not in places, "the engine's memory is not theirs to keep"
        assert param.grad is None
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    copied(ids()).backward()
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    optimizer.step()
    assert not torch.equal(copied.wte.weight, model.wte.weight)


def test_a_model_goes_from_one_engine_to_the_next(tmp_path):
    """Like a plain model with these weights, given to an engine for the first time."""
    model = build("gpt")
    (tmp_path / "first").mkdir()
    with started(model, config=settings(tmp_path / "first", 2)) as engine:
        last = trained(engine)
    results = []
    for number, again in enumerate((copy.deepcopy(model), model)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with started(again, config=settings(folder, 3, "nvme")) as engine:
            for param, (name, value) in zip(again.parameters(), last.items(), strict=True):
                assert torch.equal(zeroxide.safe_get_full_fp32_param(param), value), name
            engine.backward(engine(ids(1)))
            engine.step()
            results.append(engine.module_state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_model_of_zero_init_keeps_its_weights_too(tmp_path):
    torch.manual_seed(0)
    with zero.Init(config_dict_or_path=settings(tmp_path, 2)):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with started(model, config=settings(tmp_path, 2)) as engine:
        last = {name: value.clone() for name, value in engine.module_state_dict().items()}
    assert list(last) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, last[name]), name


def test_at_stage_3_the_modules_say_where_the_weights_went(tmp_path):
    """Empty tensors would be saved without a word."""
    model = build("gpt")
    with started(model, config=settings(tmp_path, 3)) as engine:
        state = engine.module_state_dict()
        trained(engine)
    with pytest.raises(ModelError, match="engine was destroyed"):
        model.state_dict()
    with pytest.raises(ModelError, match="engine was destroyed"):
        model(ids())
    with pytest.raises(ModelError, match="engine was destroyed"):
        model.load_state_dict(state)
    with pytest.raises(ModelError, match="did at stage 3 until that was destroyed"):
        zeroxide.initialize(model=model, config=settings(tmp_path, 3))


def refuse(optimizer):
    raise ConfigError("not with this optimizer", path="lr_scheduler")


def test_an_initialize_that_fails_late_gives_the_model_back(tmp_path):
    """A schedule that the caller makes is refused after the engine stands."""
    model = build("gpt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="not with this optimizer"):
        zeroxide.initialize(model=model, config=settings(tmp_path, 1), lr_scheduler=refuse)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("what", ["settings", "other optimizer", "data"])
def test_what_is_refused_without_an_engine_leaves_the_model_alone_at_every_stage(what, tmp_path):
    """Catches: a schedule or data set that is looked at when the engine has the weights, and stage 3 keeps them."""
    model = build("gpt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, more = settings(tmp_path, 3), {}
    if what == "settings":
        config |= {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": -3}}}
    elif what == "data":
        more["training_data"] = []
        config |= {"train_batch_size": 1}
    else:
        other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        more["lr_scheduler"] = torch.optim.lr_scheduler.StepLR(other, 1)
    with pytest.raises(DataError if what == "data" else ConfigError):
        zeroxide.initialize(model=model, config=config, **more)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


PROGRAM = """
import os, sys
import torch
import zeroxide
from torch import nn

folder, what, end = sys.argv[1:]
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))
offload = f"nvme:{folder}"
if what == "engine":
    engine, *_ = zeroxide.initialize(model=model, config={"steps_per_print": None}, offload=offload, lr=1e-3)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 64)).mean())
        engine.step()  # its last writes are still on their way
else:
    optimizer = zeroxide.optim.AdamW(model.parameters(), offload=offload)
    model(torch.ones(2, 64)).mean().backward()
    optimizer.step()
assert os.listdir(folder) != []
if end == "raise":
    raise SystemError("the end")
if end == "exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(("end", "code"), [("return", 0), ("raise", 1), ("exit", 3)])
@pytest.mark.parametrize("what", ["engine", "optimizer"])
def test_a_program_that_just_ends_leaves_no_scratch_files(what, end, code, tmp_path):
    """As DeepSpeed's scripts do. The model, in a cycle with its engine, is not collected at the end of a process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), what, end], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert ("the end" in done.stderr) == (end == "raise")
    assert done.stderr.count("Traceback") == (end == "raise"), done.stderr
