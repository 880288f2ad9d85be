"""The optimizer state of an engine as torch's optimizers show it: seen, saved, resumed, and refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import build
from running import Mode, config_of, started

import zeroxide
from zeroxide.errors import ConfigError, ModelError

PLACES = [
    (0, Mode("none", "none", "split", 1)),
    (0, Mode("none", "none", "fp32", 1)),
    (2, Mode("none", "nvme", "split", 2)),
    (3, Mode("nvme", "nvme", "fp32", 1)),
]


def settings(path, place=PLACES[0], dtype="bf16", **params):
    stage, mode = place
    config = config_of(mode, path, dtype)
    config["zero_optimization"] |= {"stage": stage}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01, **params}}
    return config


def ids(seed):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def train(engine, seeds):
    losses = []
    for seed in seeds:
        loss = engine(ids(seed))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def exact(engine):
    found = []
    for param in engine.module.parameters():
        found.append(zeroxide.safe_get_full_fp32_param(param))
        found += [zeroxide.safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")]
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1].optimizer}-{place[1].format}")
def test_a_plain_script_resumes_with_the_same_bits(place, dtype, tmp_path):
    """{"model": ..., "optimizer": ...} through a file, into a new model and engine in another mode.

    Catches: moments, step counts, exact weights or the loss scale that are not saved or not taken.
    """
    path = tmp_path / "plain.pt"
    with started(build("gpt"), config=settings(tmp_path, place, dtype)) as engine:
        train(engine, range(3))
        torch.save({"model": engine.module_state_dict(), "optimizer": engine.optimizer.state_dict()}, path)
        expected = train(engine, range(3, 6)), exact(engine), engine.loss_scale()
    saved = torch.load(path, weights_only=True)
    torch.manual_seed(99)
    model = build("gpt")
    model.load_state_dict(saved["model"])
    with started(model, config=settings(tmp_path, PLACES[0], dtype, lr=5.0)) as engine:
        engine.optimizer.load_state_dict(saved["optimizer"])
        assert engine.get_lr() == [1e-2]
        losses = train(engine, range(3, 6))
        assert losses == expected[0]
        assert all(torch.equal(a, b) for a, b in zip(exact(engine), expected[1], strict=True))
        assert engine.loss_scale() == expected[2]


def test_it_is_that_of_torch(tmp_path):
    """After the same gradients, beside torch.optim.AdamW: the moments are within a few ulps of one rounding order.

    Each of three steps rounds a moment at most twice on torch's side and once on this one: 9 u of the largest term,
    where u is 2^-24 and no term is above the largest gradient seen, or its square.
    """
    model = build("gpt")
    with started(model, config=settings(tmp_path, dtype="fp32")) as engine:
        copies = [torch.nn.Parameter(param.detach().clone()) for param in model.parameters()]
        plain = torch.optim.AdamW(copies, lr=1e-2, weight_decay=0.01)
        largest = 0.0
        for seed in range(3):
            engine.backward(engine(ids(seed)))
            for param, mine in zip(copies, model.parameters(), strict=True):
                param.grad = zeroxide.safe_get_full_grad(mine)
                largest = max(largest, param.grad.abs().max().item())
            engine.step()
            plain.step()
        found = engine.optimizer.state_dict()
        assert list(found["state"]) == list(range(len(copies)))
        for number, entry in plain.state_dict()["state"].items():
            mine = found["state"][number]
            assert set(mine) == set(entry) == {"step", "exp_avg", "exp_avg_sq"}
            assert mine["step"] == entry["step"] == 3
            assert (mine["exp_avg"] - entry["exp_avg"]).abs().max() <= 9 * 2**-24 * largest
            assert (mine["exp_avg_sq"] - entry["exp_avg_sq"]).abs().max() <= 9 * 2**-24 * largest**2
            assert torch.equal(engine.optimizer.state[list(model.parameters())[number]]["exp_avg"], mine["exp_avg"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_loads_the_state_of_torch(dtype, tmp_path):
    """Moments become torch's, in any dtype that those have, and the weights stay."""
    model = build("gpt")
    plain = copy.deepcopy(model).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    theirs = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    for seed in range(2):
        theirs.zero_grad()
        plain(ids(seed)).backward()
        theirs.step()
    with started(model, config=settings(tmp_path, dtype=dtype)) as engine:
        train(engine, range(3))
        before = [zeroxide.safe_get_full_fp32_param(param) for param in model.parameters()]
        engine.optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
        assert engine.get_lr() == [3e-3]
        for number, (param, weight) in enumerate(zip(model.parameters(), before, strict=True)):
            entry = theirs.state_dict()["state"][number]
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(zeroxide.safe_get_full_optimizer_state(param, key), entry[key].float())
            assert engine.optimizer.state[param]["step"] == 2
            assert torch.equal(zeroxide.safe_get_full_fp32_param(param), weight)
        train(engine, range(1))
        assert engine.optimizer.state[model.wte.weight]["step"] == 3


def test_state_that_is_not_there_starts_anew(tmp_path):
    """As with torch: a dict without state makes every count and moment zero."""
    model = build("gpt")
    with started(model, config=settings(tmp_path)) as engine:
        fresh = copy.deepcopy(engine.optimizer.state_dict())
        train(engine, range(2))
        engine.optimizer.load_state_dict({**fresh, "state": {}})
        for param in model.parameters():
            state = engine.optimizer.state[param]
            assert state["step"] == 0
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()


def test_a_view_reads_what_is_there_and_copies_are_plain(tmp_path):
    """Catches: a state dict that is a copy in memory, and pickles that need zeroxide."""
    model = build("gpt")
    with started(model, config=settings(tmp_path)) as engine:
        state = engine.optimizer.state
        packed = engine.optimizer.state_dict()
        frozen = copy.deepcopy(packed)
        pickled = pickle.loads(pickle.dumps(packed))
        train(engine, range(1))
        weight = model.wte.weight
        assert weight in state
        assert len(state) == len(list(model.parameters()))
        number = [id(param) for param in model.parameters()].index(id(weight))
        moment = zeroxide.safe_get_full_optimizer_state(weight, "exp_avg")
        assert moment.any()
        assert torch.equal(packed["state"][number]["exp_avg"], moment)
        assert torch.equal(state[weight]["exp_avg"], moment)
        assert torch.equal(state[weight]["master"], zeroxide.safe_get_full_fp32_param(weight))
        for copied in (frozen, pickled):
            assert not copied["state"][number]["exp_avg"].any()
            assert type(copied["state"][number]["exp_avg"]) is torch.Tensor
            assert isinstance(copied["state"], dict)
        with pytest.raises(KeyError):
            state[torch.nn.Parameter(torch.ones(1))]
        doubled = state[weight]["exp_avg"] * 2
        assert type(doubled) is torch.Tensor
        for change in (
            lambda: state[weight]["exp_avg"].zero_(),
            lambda: state[weight]["exp_avg"].data.mul_(2),
            lambda: state[weight]["exp_avg"][0].add_(1),
            lambda: state[weight]["exp_avg"].__setitem__(0, 1.0),
            lambda: torch.add(moment, 1, out=state[weight]["exp_avg"]),
            lambda: torch._foreach_zero_([moment.clone(), state[weight]["exp_avg"]]),
            lambda: state[weight].__setitem__("exp_avg", moment),
            lambda: state.__setitem__(weight, {}),
            state.clear,
            lambda: setattr(engine.optimizer, "state", {}),
        ):
            with pytest.raises(ModelError, match=r"load_state_dict"):
                change()
        with pytest.raises(ModelError, match="state_dict"):
            copy.deepcopy(engine.optimizer)


def broken(packed):
    """(what is wrong with it, a state dict)."""
    entry = packed["state"][1]

    def with_entry(**values):
        return {**packed, "state": {**packed["state"], 1: {**entry, **values}}}

    groups = packed["param_groups"]
    without = {key: value for key, value in entry.items() if key != "exp_avg_sq"}
    return [
        (r"expected a dict with state and param_groups", {"state": packed["state"]}),
        (r"expected a dict", [1]),
        (r"groups of \[\d+, 0\] parameters", {**packed, "param_groups": [*groups, {**groups[0], "params": []}]}),
        (r"exp_avg of parameter 1 .* is torch.float32 \(3,\)", with_entry(exp_avg=torch.ones(3))),
        (r"exp_avg of parameter 1 .* is int", with_entry(exp_avg=3)),
        (r"master of parameter 1 .* is torch.int64", with_entry(master=torch.ones_like(entry["master"]).long())),
        (r"has 'momentum_buffer'", with_entry(momentum_buffer=torch.ones(3))),
        (r"has no 'exp_avg_sq'", {**packed, "state": {**packed["state"], 1: without}}),
        (r"step of parameter 1 .* is 1.5", with_entry(step=1.5)),
        (r"an entry 999", {**packed, "state": {**packed["state"], 999: entry}}),
        (r"amsgrad", {**packed, "param_groups": [{**groups[0], "amsgrad": True}]}),
        (r"has no betas", {**packed, "param_groups": [{k: v for k, v in groups[0].items() if k != "betas"}]}),
        (r"saved by Adam,", {**packed, "param_groups": [{**groups[0], "decoupled": False}]}),
        (r"lr is NaN", {**packed, "param_groups": [{**groups[0], "lr": float("nan")}]}),
    ]


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    model = build("gpt")
    with started(model, config=settings(tmp_path)) as engine:
        train(engine, range(2))
        packed = copy.deepcopy(engine.optimizer.state_dict())
        before = exact(engine)
        for line, wrong in broken(packed):
            with pytest.raises(ConfigError, match=line) as caught:
                engine.optimizer.load_state_dict(wrong)
            assert "\n" not in str(caught.value)
        assert all(torch.equal(a, b) for a, b in zip(exact(engine), before, strict=True))
        assert engine.get_lr() == [1e-2]
        sgd = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(ConfigError, match="has no betas"):
            engine.optimizer.load_state_dict(sgd.state_dict())


def test_groups_are_fixed_and_a_change_is_noticed(tmp_path):
    """Before anything is counted: the same step goes through once the groups are as they were."""
    model = build("gpt")
    with started(model, config=settings(tmp_path)) as engine:
        optimizer = engine.optimizer
        with pytest.raises(ConfigError, match="add_param_group"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        before = optimizer.param_groups
        params = list(before[0]["params"])
        extra = torch.nn.Parameter(torch.ones(3))
        for change in (
            lambda: before[0]["params"].pop(),
            lambda: before[0]["params"].append(extra),
            lambda: before[0].__setitem__("params", [extra, *params[1:]]),
            lambda: setattr(optimizer, "param_groups", [{**before[0], "params": params[:1]}, dict(before[0])]),
            lambda: setattr(optimizer, "param_groups", []),
        ):
            engine.backward(engine(ids(0)))
            change()
            for step in (engine.step, optimizer.step):
                with pytest.raises(ConfigError, match=r"param_groups holds other parameters"):
                    step()
            optimizer.param_groups = before
            before[0]["params"] = list(params)
            steps = engine.micro_steps
            engine.step()
            assert engine.micro_steps == steps + 1
            assert engine.was_step_applied()
        # A list of new dicts with the same parameters is what loading leaves, and works.
        optimizer.param_groups = [{**before[0], "lr": 0.0, "weight_decay": 0.0}]
        weights = [param.detach().clone() for param in model.parameters()]
        train(engine, range(1))
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_hooks_of_state_dicts_run(tmp_path):
    """Those of torch's optimizers, with what they return. Catches: one that is registered and never called."""
    model = build("gpt")
    with started(model, config=settings(tmp_path)) as engine:
        plain = zeroxide.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
        for optimizer in (engine.optimizer, plain):
            seen = []
            optimizer.register_state_dict_pre_hook(lambda o, seen=seen: seen.append("before saving"))
            optimizer.register_state_dict_post_hook(lambda o, packed: {"packed": packed})
            optimizer.register_load_state_dict_pre_hook(lambda o, packed: packed["packed"])
            optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append("loaded"))
            packed = optimizer.state_dict()
            assert list(packed) == ["packed"]
            optimizer.load_state_dict(packed)
            assert seen == ["before saving", "loaded"]
        plain.close()
