"""Parameters without values: whatever needs the values is refused by name, and what does not goes on."""

from __future__ import annotations

import copy
import io
import signal
import subprocess
import sys

import pytest
import torch
from models import build
from running import Mode, assert_released, config_of, started
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import zeroxide
from zeroxide import zero
from zeroxide.errors import ModelError
from zeroxide.params import empty


@pytest.fixture(params=[Mode(), Mode("nvme", "nvme", "split", 1, "threads", 8192, 1 << 20, 0)], ids=str)
def config(request, tmp_path):
    return config_of(request.param, tmp_path, "fp32")


def ids(seed=0):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def saved_by_safetensors(w, model):
    from safetensors.torch import save

    save({"w": w})


REFUSED = {
    "in place": lambda w, model: w.mul_(0.9),
    "data in place": lambda w, model: w.data.add_(torch.ones(())),
    "data": lambda w, model: setattr(w, "data", torch.ones(48)),
    "data of data": lambda w, model: w.data.zero_(),
    "element": lambda w, model: w.__setitem__(0, 1.0),
    "copy in": lambda w, model: w.copy_(torch.ones(48)),
    "out": lambda w, model: torch.add(torch.ones(48), 1.0, out=w),
    "init": lambda w, model: nn.init.zeros_(w),
    "foreach": lambda w, model: torch._foreach_mul_([w], 2.0),
    "cast": lambda w, model: w.double(),
    "half": lambda w, model: model.half(),
    "double": lambda w, model: model.to(torch.float64),
    "meta": lambda w, model: model.to("meta"),
    "share": lambda w, model: model.share_memory(),
    "from vector": lambda w, model: vector_to_parameters(torch.zeros(999_999), [w]),
    "save": lambda w, model: torch.save({"w": w}, io.BytesIO()),
    "save data": lambda w, model: torch.save({"w": w.data}, io.BytesIO()),
    "safetensors": saved_by_safetensors,
    "copy": lambda w, model: copy.deepcopy(w),
    "address": lambda w, model: w.data_ptr(),
    "address of data": lambda w, model: w.data.data_ptr(),
    "update": lambda w, model: torch.optim.SGD([w], lr=1).param_groups[0]["params"][0].add_(1.0),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED.keys())
def test_what_would_change_nothing_or_save_nothing_is_refused_by_name(use, tmp_path):
    """Most of these do nothing, without a word, to a tensor of size 0."""
    model = build("gpt")
    before = copy.deepcopy(model.state_dict())
    with started(model, config=config_of(Mode(), tmp_path, "fp32")) as engine:
        with pytest.raises(ModelError, match=r"[a-z.]+ \([\d, ]+\) is empty, and \w+ needs its values") as caught:
            use(model.norm.weight, model)
        assert "\n" not in str(caught.value)
        assert caught.value.name in dict(model.named_parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert_released(engine)


def averaged(model):
    average = AveragedModel(build("gpt"))
    average.update_parameters(model)
    return torch.cat([each.detach().flatten() for each in average.module.parameters()])


READ = {
    "sum": lambda w, model: w + torch.ones(1),
    "product": lambda w, model: w @ w,
    "detach": lambda w, model: w.detach(),
    "view": lambda w, model: w[3:7],
    "data": lambda w, model: w.data.norm(),
    "copy of data": lambda w, model: w.data.clone(),
    "copy out": lambda w, model: torch.ones(48).copy_(w),
    "list": lambda w, model: torch.cat([torch.ones(1), w]),
    "keyword": lambda w, model: functional.layer_norm(torch.ones(2, 48).tril(), (48,), weight=w),
    "compare": lambda w, model: w == 1,
    "numpy": lambda w, model: torch.tensor(w.detach().numpy().copy()),
    "list of numbers": lambda w, model: torch.tensor(w.tolist()),
    "item": lambda w, model: torch.tensor(w.sum().item()),
    "vector": lambda w, model: parameters_to_vector(model.parameters()),
    "penalty": lambda w, model: sum(each.square().sum() for each in model.parameters()),
    "average": lambda w, model: averaged(model),
}


@pytest.mark.parametrize("use", READ.values(), ids=READ.keys())
def test_what_reads_values_gets_them(use, config):
    """Plain torch, with the same operation on the same values, is the oracle: the same bits."""
    model = build("gpt")
    plain = copy.deepcopy(model)
    with started(model, config=config) as engine:
        found = use(model.norm.weight, model)
        assert torch.equal(found, use(plain.norm.weight, plain))
        # It is a copy: what is done to it, or to the engine, is not done to the other.
        kept = found.detach().clone()
        for _ in range(2):
            engine.backward(engine(ids()))
            engine.step()
        assert torch.equal(found, kept)
        assert_released(engine)


def test_a_penalty_on_weights_outside_of_forward_has_its_gradient(config):
    """The gradient of sum(w^2) / 2 is w, exactly."""
    model = build("gpt")
    before = copy.deepcopy(dict(model.named_parameters()))
    with started(model, config=config) as engine:
        for backward in (engine.backward, torch.Tensor.backward):
            backward(0.5 * sum(each.square().sum() for each in model.parameters()))
            for name, param in model.named_parameters():
                assert torch.equal(zeroxide.safe_get_full_grad(param), before[name].detach()), name
            engine.zero_grad()
            assert_released(engine)


def test_a_parameter_without_values_always_has_the_class_that_asks(config, monkeypatch):
    """Catches: a class that changes after the values have gone, or before they have come: another thread that reads in
    between is not refused."""
    model, plain, real = build("gpt"), [], empty._set_data

    def set_data(param, data):
        plain.append(not isinstance(param, empty._Empty))
        real(param, data)

    with started(model, config=config) as engine:
        monkeypatch.setattr(empty, "_set_data", set_data)
        engine.backward(engine(ids()).sum())
        engine.step()
        assert plain
        assert not any(plain)


def test_what_needs_no_values_goes_on(config):
    model = build("gpt")
    plain = copy.deepcopy(model)
    with started(model, config=config) as engine:
        w = model.norm.weight
        assert (w.shape, w.numel(), w.dim(), w.dtype, w.device.type) == ((0,), 0, 1, torch.float32, "cpu")
        assert (w.requires_grad, w.grad, w.is_leaf, w.is_floating_point(), w.nbytes) == (True, None, True, True, 0)
        assert w.type() == "torch.FloatTensor"
        assert "Parameter" in repr(w)
        assert repr(model) == repr(plain)
        assert len({w, w}) == 1
        assert w in [w]
        assert isinstance(w, nn.Parameter)
        assert type(w).__name__ == "ManagedParameter"
        assert model.to("cpu") is model
        model.float()
        model.to(torch.float32).train().zero_grad()
        model.requires_grad_(True)
        clip_grad_norm_(model.parameters(), 1.0)
        torch.optim.AdamW(model.parameters(), lr=1).zero_grad()
        loss = engine(ids())
        assert loss.item() == pytest.approx(plain(ids()).item(), rel=1e-6)
        engine.backward(loss)
        engine.step()
        assert_released(engine)


def test_no_operation_of_a_pass_is_looked_at(config):
    """Parameters in use are not asked: an operation costs what it does in torch."""
    model, asked = build("gpt"), []
    for block in model.h:
        block.register_forward_pre_hook(
            lambda module, args: asked.append(torch.overrides.has_torch_function(tuple(module.parameters())))
        )
    with started(model, config=config) as engine:
        engine.backward(engine(ids()))
        assert asked == [False] * len(model.h)
        assert torch.overrides.has_torch_function((model.norm.weight,))
        with zero.GatheredParameters(model):
            assert not torch.overrides.has_torch_function(tuple(model.parameters()))


class Marked(nn.Parameter):
    """A parameter class of a library."""


def test_other_parameter_classes_keep_theirs(config):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = Marked(model[0].weight.data)
    plain, kinds = copy.deepcopy(model), []
    hook = model[0].register_forward_pre_hook(lambda module, args: kinds.append(type(module.weight)))
    with started(model, config=config) as engine:
        weight = model[0].weight
        assert isinstance(weight, Marked)
        assert type(weight).__name__ == "Marked"
        assert torch.equal(weight + 1, plain[0].weight + 1)
        for act in (
            lambda: weight.data.add_(1),
            lambda: copy.deepcopy(model),
            lambda: torch.save(model[0], io.BytesIO()),
        ):
            with pytest.raises(ModelError, match=r"0\.weight \(4, 4\) is empty"):
                act()
        x = torch.rand(2, 4)
        assert torch.equal(engine(x), plain(x))
        assert kinds == [Marked]
        hook.remove()
        with zero.GatheredParameters(model):
            assert type(copy.deepcopy(model)[0].weight) is Marked
            file = io.BytesIO()
            torch.save(model, file)
            for copied in (copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
                assert torch.equal(copied(x), plain(x))
                assert zeroxide.safe_get_full_fp32_param(copied[0].weight) is None
    assert b"zeroxide" not in file.getvalue()


class LowRank(nn.Module):
    """A linear layer with an adapter that is merged as libraries of adapters do it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)
        base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 0.5

    def merged(self):
        self.base.weight.data += self.up.weight @ self.down.weight * 0.5
        return self.base


def test_adapters_are_merged_where_weights_are_or_refused(config):
    """The oracle is the product in float64; fp32 sums three products of numbers below 1: 6 * 2^-24 < 1e-6."""
    model = nn.Sequential(LowRank(nn.Linear(8, 8)), LowRank(nn.Linear(8, 8)))
    expected = [
        each.base.weight.detach().double() + each.up.weight.detach().double() @ each.down.weight.detach().double() * 0.5
        for each in model
    ]
    with started(model, config=config):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ModelError, match=r"0\.(base|up)\.weight .* is empty"):
            model[0].merged()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        with torch.no_grad(), zero.GatheredParameters(model, modifier_rank=0):
            merged = nn.Sequential(*(each.merged() for each in model))
        state = merged.state_dict()
        for at, value in enumerate(expected):
            assert (state[f"{at}.weight"].double() - value).abs().max() <= 1e-6


def test_models_in_slices_are_not_saved_empty(tmp_path):
    with zero.Init():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        assert model[0].weight.detach().shape == (4, 4)
    # Libraries look at the names of a state dict before they load one; whoever takes it for values is told.
    state = model.state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    acts = [
        lambda: torch.save(state, tmp_path / "state.pt"),
        lambda: save_file(state, tmp_path / "state.safetensors"),
        lambda: [value.clone() for value in state.values()],
        lambda: copy.deepcopy(state),
        lambda: state["0.weight"].zero_(),
    ]
    for act in (*acts, lambda: copy.deepcopy(model), lambda: model[0].weight.data, model.double):
        with pytest.raises(ModelError, match=r"0\.weight \(4, 4\) is empty"):
            act()
    with zero.GatheredParameters(model):
        assert model.state_dict()["0.weight"].shape == (4, 4)


def test_a_shallow_copy_is_not_saved_empty(config):
    model = build("gpt")
    before = model.norm.weight.detach().clone()
    with started(model, config=config):
        assert torch.equal(copy.copy(model.norm).state_dict()["weight"], before)


class Odd(nn.Linear):
    """Returns tensors that have no memory beside what it computes."""

    def forward(self, x):
        return super().forward(x), torch.eye(2).to_sparse(), torch.empty(2, device="meta")


def test_modules_may_return_tensors_without_memory(config):
    model = nn.Module()
    model.h = nn.ModuleList([Odd(4, 4), Odd(4, 4)])
    model.last = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.forward = lambda x: torch.vmap(model.last[0])(model.h[1](model.h[0](x)[0])[0])
    x = torch.rand(3, 4)
    expected = model.forward(x).detach()
    with started(model, config=config) as engine:
        assert torch.allclose(engine(x).detach(), expected, rtol=0, atol=1e-6)
        engine.backward(engine(x).sum())


REAL_FAULT = """
import ctypes, faulthandler, sys
import torch
import zeroxide

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
disk = {"device": "nvme", "nvme_path": sys.argv[1]}
config = {"zero_optimization": {"stage": 3, "offload_param": disk}}
engine, *_ = zeroxide.initialize(model=model, config=config, lr=1e-3)
faulthandler.enable()
engine(torch.ones(1, 4))
ctypes.string_at(8)
"""


def test_a_fault_elsewhere_ends_the_process_whoever_installed_a_handler_since(tmp_path):
    """A handler that prints and returns is called a few times, not for ever."""
    ended = subprocess.run(
        [sys.executable, "-c", REAL_FAULT, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in ended.stderr
