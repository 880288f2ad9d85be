"""An engine that cannot be made leaves nothing behind, and the model and optimizer as they were."""

from __future__ import annotations

import pytest
import torch
from left_behind import differences, hooks_of, identities, resources, values
from models import build
from running import Mode, config_of
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.engine import build as build_module
from zeroxide.errors import BudgetError, ConfigError

PLACES = (
    "LossScaler",
    "Watch",
    "groups_for",
    "check_groups",
    "mark_leaf_modules",
    "plan_within",
    "check_all_grouped",
    "open_core",
    "Messages",
    "replace_meta_parameters",
    "Unit",
    "make_weight_gather",
    "make_reduction",
    "connect",
    "fill_units",
    "cast_buffers",
    "Gatherer",
    "Hooks",
    "ParameterContext",
    "shard_all",
    "refuse_loading",
    "StateDicts",
    "PlainCopies",
    "EngineOptimizer",
)
"""What the construction calls, also in the middle of its steps."""


class Stop(Exception):
    """Raised where the test wants it."""


def ids():
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def settings(folder, stage, home):
    config = config_of(Mode(home, home), folder, "fp32")
    config["zero_optimization"] |= {"stage": stage, "leaf_module": {"classes": ["Block"]}}
    config["data_types"] = {"buffer_dtype": "bf16"}
    return config


def made(stage):
    torch.manual_seed(3)
    model = build("gpt")
    model.register_buffer("scale", torch.full((3,), 1.2345))
    model.register_forward_pre_hook(lambda *_: None)
    model.wte.weight.register_post_accumulate_grad_hook(lambda _: None)
    model.wte.weight.grad = torch.ones_like(model.wte.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer


def trained(model, optimizer, config):
    engine = zeroxide.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.backward(engine(ids()))
    engine.step()
    got = {name: zeroxide.safe_get_full_fp32_param(param).clone() for name, param in model.named_parameters()}
    engine.destroy()
    return got


@pytest.mark.parametrize(("stage", "home"), [(2, "none"), (3, "nvme")])
def test_a_failure_within_a_step_leaves_nothing_and_the_model_whole(stage, home, tmp_path, monkeypatch):
    config = settings(tmp_path, stage, home)
    config.pop("optimizer")
    expected = trained(*made(stage), config)
    model, optimizer = made(stage)
    plain = {name: value.detach().clone() for name, value in model.state_dict().items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    members = [list(map(id, group["params"])) for group in optimizer.param_groups]
    hooks, before = hooks_of(model), resources()
    for step in PLACES:

        def fail(*args, **kwargs):
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(build_module, step, fail)
            with pytest.raises(Stop):
                zeroxide.initialize(model=model, optimizer=optimizer, config=config)
        assert hooks_of(model) == hooks, step
        assert resources() == before, step
        for name, value in model.state_dict().items():
            assert value.dtype == plain[name].dtype, (step, name)
            assert torch.equal(value, plain[name]), (step, name)
        assert model.head.weight is model.wte.weight, step
        assert torch.equal(model.wte.weight.grad, torch.ones_like(model.wte.weight)), step
        assert list(tmp_path.iterdir()) == [], step
        assert members == [list(map(id, group["params"])) for group in optimizer.param_groups], step
        assert groups == [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ], step
    got = trained(model, optimizer, config)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("stage", "home"), [(2, "none"), (3, "nvme")])
def test_the_construction_leaves_nothing_after_any_of_its_steps(stage, home, tmp_path, monkeypatch):
    # Catches: a step that does not register how what it made is closed, or what it changed is undone.
    config = settings(tmp_path, stage, home)
    config.pop("optimizer")
    expected = trained(*made(stage), config)
    model, optimizer = made(stage)
    hooks, before, plain, who = hooks_of(model), resources(), values(model), identities(model)
    done = []
    for number, (name, _) in enumerate(build_module.STEPS):

        def stop(under_way):
            done.append(under_way)
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(build_module, "STEPS", (*build_module.STEPS[: number + 1], ("stop", stop)))
            with pytest.raises(Stop):
                zeroxide.initialize(model=model, optimizer=optimizer, config=config)
        # Whoever holds what was half made, as a debugger does, holds no resource with it.
        assert len(done) == number + 1
        assert resources() == before, name
        assert hooks_of(model) == hooks, name
        assert identities(model) == who, name
        assert differences(plain, values(model)) == [], name
        assert list(tmp_path.iterdir()) == [], name
    assert [name for name, _ in build_module.STEPS][-1] == "show"
    done.clear()
    got = trained(model, optimizer, config)
    assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


@pytest.mark.parametrize("step", ["open_core", "Unit", "Hooks", "EngineOptimizer"])
def test_a_model_in_slices_is_whole_again_too(step, tmp_path, monkeypatch):
    def sliced():
        torch.manual_seed(3)
        with zero.Init():
            return build("gpt")

    config = settings(tmp_path, 3, "nvme")
    reference = sliced()
    with zero.GatheredParameters(reference.parameters()):
        plain = [param.detach().clone() for param in reference.parameters()]
    model = sliced()

    def fail(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(build_module, step, fail)
        with pytest.raises(Stop):
            zeroxide.initialize(model=model, config=config)
    assert all(param.numel() == 0 for param in model.parameters())
    with zero.GatheredParameters(model.parameters()):
        for param, value in zip(model.parameters(), plain, strict=True):
            assert torch.equal(param, value)
    assert trained(model, None, config).keys() == dict(model.named_parameters()).keys()


def test_a_model_on_meta_stays_there(tmp_path, monkeypatch):
    class Ones:
        def fill(self, tensors, modules):
            for tensor in tensors.values():
                tensor.fill_(1.0)

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    params = list(model.parameters())
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}

    def fail(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "Hooks", fail)
        with pytest.raises(Stop):
            zeroxide.initialize(model=model, config=config, weights=Ones())
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    assert {each.device.type for each in [*model.parameters(), *model.buffers()]} == {"meta"}
    engine = zeroxide.initialize(model=model, config=config, weights=Ones())[0]
    assert torch.equal(zeroxide.safe_get_full_fp32_param(model[0].weight), torch.ones(4, 4))
    engine.destroy()


def test_what_cannot_be_given_back_is_refused_by_name(tmp_path, monkeypatch):
    """As where the disk that the weights have moved to is gone, or other ranks have the rest of them."""
    from zeroxide.zero import undo

    def fail(*args, **kwargs):
        raise Stop

    model, optimizer = made(3)
    monkeypatch.setattr(undo, "_read", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "Hooks", fail)
        with pytest.raises(Stop):
            zeroxide.initialize(model=model, optimizer=optimizer, config=settings(tmp_path, 3, "nvme"))
    for use in (lambda: model(ids()), model.state_dict):
        with pytest.raises(zeroxide.errors.ModelError, match="could not be made, after they had moved into it"):
            use()


def test_a_refused_budget_and_a_failing_schedule_leave_nothing(tmp_path):
    model, _ = made(3)
    before, hooks = resources(), hooks_of(model)
    plain = {name: value.detach().clone() for name, value in model.state_dict().items()}
    config = settings(tmp_path, 3, "nvme")

    def schedule(optimizer):
        raise Stop

    for wrong, more in ((BudgetError, {"host_memory": 1 << 20}), (Stop, {"lr_scheduler": schedule})):
        with pytest.raises(wrong):
            zeroxide.initialize(model=model, config=config, **more)
        assert resources() == before
        assert hooks_of(model) == hooks
        assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="in no optimizer group, the first is"):
        zeroxide.initialize(model=model, model_parameters=[model.wte.weight], config=config)
    assert resources() == before
