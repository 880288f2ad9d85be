"""What a script does to a model behind its engine's back: it counts as in plain torch, or is refused by name."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from running import Mode, config_of, started
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import zeroxide
from zeroxide.errors import ModelError
from zeroxide.plan import discover


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(blocks))
        self.out = nn.Linear(16, 2)

    def forward(self, x):
        x = self.first(x)
        for block in self.h:
            x = block(x)
        return self.out(x)


def rows(seed):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def config(tmp_path, stage, dtype="fp32", mode=None):
    return config_of(mode or Mode(), tmp_path, dtype) | {"zero_optimization": {"stage": stage}}


def train(engine, seed):
    loss = engine(rows(seed)).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.detach()


# Two AdamW steps of plain torch and of the engine differ by a few roundings each (tests/numerics/bound.py derives it);
# a step from other weights differs by the learning rate, 1e-3.
CLOSE = {"rtol": 0, "atol": 2e-6}


def plain_steps(plain, optimizer, seed):
    optimizer.zero_grad()
    plain(rows(seed)).square().mean().backward()
    optimizer.step()


def fgm(model, step):
    """A step on perturbed weights, whose values come back through `.data`."""
    kept = {name: param.data.clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.data.add_(0.1)
    step()
    for name, param in model.named_parameters():
        param.data = kept[name]


EDITS = {
    "clone": lambda model: [setattr(each, "data", each.data.clone()) for each in model.parameters()],
    "values": lambda model: [setattr(each, "data", each.data * 0.5) for each in model.parameters()],
    "vector": lambda model: vector_to_parameters(
        parameters_to_vector(model.parameters()).detach() * 0.5, model.parameters()
    ),
    "there and back": lambda model: model.double().float(),
    "in place": lambda model: [each.data.clamp_(-0.05, 0.05) for each in model.parameters()],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_replaced_data_counts_as_in_plain_torch(stage, edit, tmp_path):
    model = Net()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    with started(model, config=config(tmp_path, stage)) as engine:
        engine.set_lr(1e-3)
        for group in engine.optimizer.param_groups:
            group["weight_decay"] = 0.0
        for seed in range(3):
            train(engine, seed)
            plain_steps(plain, optimizer, seed)
            edit(model)
            edit(plain)
        for (name, mine), param in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(mine.detach(), param.detach(), **CLOSE), name
        train(engine, 3)
        for name, mine in model.named_parameters():
            assert torch.equal(mine.detach(), zeroxide.safe_get_full_fp32_param(mine)), name


@pytest.mark.parametrize("stage", [0, 2])
def test_weights_that_come_back_through_data_are_the_ones_that_are_stepped(stage, tmp_path):
    model = Net()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    with started(model, config=config(tmp_path, stage)) as engine:
        for group in engine.optimizer.param_groups:
            group.update(lr=1e-3, weight_decay=0.0)
        for seed in range(2):
            x = rows(seed)
            fgm(model, lambda x=x: engine.backward(engine(x).square().mean()))
            engine.step()
            optimizer.zero_grad()
            fgm(plain, lambda x=x: plain(x).square().mean().backward())
            optimizer.step()
        for (name, mine), param in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(mine.detach(), param.detach(), **CLOSE), name


@pytest.mark.parametrize("stage", [0, 2])
def test_a_model_that_was_cast_is_refused_by_name(stage, tmp_path):
    model = Net()
    with started(model, config=config(tmp_path, stage, "bf16")) as engine:
        train_bf16 = lambda: engine(rows(0).bfloat16()).float().square().mean()  # noqa: E731
        engine.backward(train_bf16())
        engine.step()
        model.float()
        with pytest.raises(ModelError, match=r"first\.weight is float32 .* bfloat16 .* in the engine") as caught:
            train_bf16()
        assert caught.value.name == "first.weight"
        model.bfloat16()
        engine.backward(train_bf16())
        engine.step()
        assert engine.was_step_applied()


def thaw(model):
    model.h[0].requires_grad_(True)


def adapt(model):
    model.h[1].add_module("adapter", nn.Linear(16, 16))


def replace(model):
    model.out = nn.Linear(16, 2)


def insert(model):
    model.h.insert(1, nn.Sequential(nn.Linear(16, 16)))


def rewrap(model):
    model.first.weight = nn.Parameter(torch.zeros(16, 8))


def remove(model):
    del model.h[2]


CHANGES = {
    "thaw": (thaw, r"h\.0\.0\.weight \(and 1 more\) was frozen"),
    "adapt": (adapt, r"h\.1\.adapter\.weight has appeared"),
    "replace": (replace, r"out\.weight has appeared"),
    "insert": (insert, r"h\.1\.0\.weight has appeared"),
    "rewrap": (rewrap, r"first\.weight has appeared"),
    "remove": (remove, r"h\.2\.0\.weight is no longer part"),
}


@pytest.mark.parametrize(("change", "line"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("stage", [0, 3])
def test_other_parameters_than_before_are_refused_by_name(stage, change, line, tmp_path):
    model = Net()
    model.h[0].requires_grad_(False)
    with started(model, config=config(tmp_path, stage)) as engine:
        train(engine, 0)
        change(model)
        with pytest.raises(ModelError, match=line) as caught:
            train(engine, 1)
        assert "\n" not in str(caught.value)
        if change is not thaw:
            with pytest.raises(ModelError, match=line):
                engine.save_checkpoint(tmp_path / "checkpoints")


def test_modules_without_parameters_come_and_go(tmp_path):
    model = Net()
    with started(model, config=config(tmp_path, 3)) as engine:
        train(engine, 0)
        model.h[0][1] = nn.ReLU()
        model.h[1].add_module("dropout", nn.Dropout(0.5))
        train(engine, 1)
        assert engine.global_steps == 2


def test_parameters_over_the_same_memory_are_refused_and_tied_ones_are_not(tmp_path):
    model = Net()
    model.h[1][0].weight.data = model.h[0][0].weight.data
    with pytest.raises(
        ModelError, match=r"h\.0\.0\.weight and h\.1\.0\.weight are two parameters over the same memory"
    ):
        zeroxide.initialize(model=model, config=config(tmp_path, 0))
    model.h[1][0].weight = model.h[0][0].weight
    flat = torch.zeros(2, 16)
    model.h[1][0].bias.data, model.h[2][0].bias.data = flat[0], flat[1]
    with started(model, config=config(tmp_path, 0)) as engine:
        train(engine, 0)


class Positive(nn.Linear):
    """Keeps its weight above zero by changing it in forward."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(min=0)
        return super().forward(x)


class PositiveData(nn.Linear):
    """As `Positive`, in a way that no version counter tells of, before and after its product."""

    def forward(self, x):
        self.weight.data.clamp_(min=0)
        y = super().forward(x)
        self.weight.data[0] = 0.25
        return y


@pytest.mark.parametrize("kind", [Positive, PositiveData])
@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "nvme", prefetch=0), Mode("nvme", "nvme", "split")], ids=str)
def test_a_weight_changed_in_forward_counts_as_in_plain_torch(mode, kind, tmp_path):
    """Catches: a change that goes with the memory under it, or is taken for a damaged file."""
    model = Net()
    model.h = nn.ModuleList(kind(16, 16) for _ in range(5))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        for group in engine.optimizer.param_groups:
            group.update(lr=1e-3, weight_decay=0.0)
        for seed in range(3):
            train(engine, seed)
            plain_steps(plain, optimizer, seed)
        for (name, mine), param in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(zeroxide.safe_get_full_fp32_param(mine), param.detach(), **CLOSE), name


class Nested(nn.Module):
    """Changes its weight and calls its child before it uses it."""

    def __init__(self, depth, by_data):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.child = Nested(depth - 1, by_data) if depth else None
        self.by_data = by_data

    def forward(self, x):
        with torch.no_grad():
            (self.weight.data if self.by_data else self.weight).mul_(0.5)
        return (x if self.child is None else self.child(x)) @ self.weight


@pytest.mark.parametrize("by_data", [False, True])
def test_a_change_counts_though_the_memory_under_it_is_needed(by_data, tmp_path, monkeypatch):
    """Catches: a unit in use that gives way before what was written into it is taken over."""
    monkeypatch.setattr(discover, "DEFAULT_UNIT_BYTES", 8)
    model = nn.Sequential(Nested(4, by_data), Nested(4, by_data))
    plain = copy.deepcopy(model)
    with started(model, config=config_of(Mode("nvme", "nvme"), tmp_path, "fp32")) as engine, torch.no_grad():
        for _ in range(2):
            assert torch.equal(engine(torch.ones(2, 16)), plain(torch.ones(2, 16)))
        for (name, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
            assert torch.equal(value, expected), name


class Router(nn.Linear):
    """Casts itself where it runs, as routers of experts do."""

    def forward(self, x):
        self.to(torch.float32)
        return super().forward(x.float()).to(x.dtype)


@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "nvme", prefetch=0)], ids=str)
def test_a_module_may_cast_itself_to_a_wider_dtype_in_forward(mode, tmp_path):
    model = Net()
    model.h = nn.ModuleList(Router(16, 16) for _ in range(3))
    plain = copy.deepcopy(model).to(torch.bfloat16)
    x = rows(0).to(torch.bfloat16)
    with started(model, config=config_of(mode, tmp_path, "bf16")) as engine:
        for _ in range(2):
            loss, expected = engine(x).square().mean(), plain(x).square().mean()
            assert torch.equal(loss, expected)
            plain.zero_grad()
            expected.backward()
            engine.backward(loss)
            for (name, mine), param in zip(model.named_parameters(), plain.named_parameters(), strict=True):
                found = zeroxide.safe_get_full_grad(mine)
                assert torch.equal(found, param[1].grad.to(torch.bfloat16).float()), name
            engine.zero_grad()


class Interrupted(nn.Linear):
    """Is interrupted where it is told to be."""

    at = False

    def forward(self, x):
        if self.at:
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "nvme")], ids=str)
def test_an_interrupted_forward_ends_the_pass(mode, tmp_path):
    """Catches: weights that stay open to changes between steps, which the next step would lose."""
    model = Net()
    model.h = nn.ModuleList(Interrupted(16, 16) for _ in range(3))
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        train(engine, 0)
        model.h[1].at = True
        with pytest.raises(KeyboardInterrupt):
            engine(rows(0))
        model.h[1].at = False
        for each in model.h:
            with pytest.raises(ModelError, match="is empty"), torch.no_grad():
                each.weight.mul_(0.5)
        train(engine, 1)


@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "nvme")], ids=str)
def test_another_thread_reads_the_right_weights_or_is_refused(mode, tmp_path):
    """Catches: units that one thread lets go while the other uses them."""
    model = Net()
    wanted = {name: param.detach().clone() for name, param in model.named_parameters()}
    said, ended = [], threading.Event()

    def look():
        while not ended.is_set():
            for name, param in model.named_parameters():
                try:
                    found = param.detach().clone()
                    # torch lets go of the interpreter lock inside of an operation: one that has begun when its weight
                    # is emptied may come out empty, never with other values (README, Limits).
                    if found.numel() and not torch.equal(found, wanted[name]):
                        said.append(name)
                except ModelError as error:
                    if "used by another thread" not in str(error):
                        said.append(str(error))

    plain = copy.deepcopy(model)
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        for group in engine.optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        reader = threading.Thread(target=look)
        reader.start()
        try:
            for seed in range(20):
                loss = engine(rows(seed)).square().mean()
                assert torch.equal(loss, plain(rows(seed)).square().mean())
                engine.backward(loss)
                engine.step()
        finally:
            ended.set()
            reader.join()
    assert said == []


class Given(nn.Module):
    """Hands out its parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self):
        return self.scale


@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "nvme")], ids=str)
def test_a_parameter_that_is_handed_out_gets_no_hooks(mode, tmp_path):
    model = Net()
    model.given = nn.ModuleList([Given(), Given()])
    inner = model.forward
    model.forward = lambda x: inner(x) * (model.given[0]() + model.given[1]()).sum()
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        for seed in range(3):
            train(engine, seed)
        assert not model.given[0].scale._backward_hooks


def test_a_step_inside_gathered_parameters_is_refused(tmp_path):
    model = Net()
    with started(model, config=config(tmp_path, 3)) as engine:
        with (
            pytest.raises(ModelError, match=r"step\(\) inside GatheredParameters"),
            zeroxide.zero.GatheredParameters(model.first.weight),
        ):
            train(engine, 0)
        engine.step()
        assert engine.was_step_applied()
