"""What modules of an engine answer when they are asked for their state, in torch's own words.

Oracles are values that the test has set itself, and plain torch models trained beside.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import build, loss_of
from running import Mode, assert_released, config_of, started
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.errors import ModelError

MODES = [Mode(), Mode("nvme", "nvme", "split", 1, "threads", 8192, 1 << 20, 0), Mode("none", "nvme", "fp32")]
PLACES = [(3, mode) for mode in MODES] + [(0, Mode()), (2, Mode("none", "nvme"))]


@pytest.fixture(params=PLACES, ids=lambda place: f"stage-{place[0]}-{place[1]}")
def settings(request, tmp_path):
    stage, mode = request.param

    def of(dtype="fp32", **more):
        config = config_of(mode, tmp_path, dtype, **more)
        config["zero_optimization"] |= {"stage": stage}
        if stage < 3:
            del config["zero_optimization"]["offload_param"]
        return config

    return of


@pytest.fixture
def stage3(tmp_path):
    return config_of(Mode(), tmp_path, "fp32")


def ids(seed=0):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def train(engine, seed=0):
    engine.backward(engine(ids(seed)))
    engine.step()


def same(one, other):
    assert list(one) == list(other)
    for name, value in other.items():
        assert one[name].dtype == value.dtype, name
        assert torch.equal(one[name], value), name


def storages(state):
    return {name: value.untyped_storage().data_ptr() for name, value in state.items()}


class Odd(nn.Module):
    """Everything that a state dict can have: buffers, extra state, hooks, a tie, frozen values, a save of its own."""

    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "sum"] = self.weight.detach().sum()

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), Odd.Packed(6, 6)) for _ in range(2))
        self.h[0].requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.h[1][0].weight
        self.register_buffer("table", torch.rand(3))
        self.register_buffer("scratch", torch.rand(3), persistent=False)
        self.head.register_state_dict_post_hook(
            lambda module, state, prefix, local: state.__setitem__(prefix + "mean", state[prefix + "weight"].mean())
        )

    def get_extra_state(self):
        return torch.tensor([3.0])

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        for block in self.h:
            x = torch.tanh(block(x))
        return self.head(self.norm(x) * self.scale).square().mean()


def test_a_model_says_what_it_was_given(settings):
    """Catches: empty tensors, ties that come apart, what a class or a hook makes of its weights."""
    model = Odd()
    expected = copy.deepcopy(model.state_dict())
    with started(model, config=settings()):
        found = model.state_dict()
        same(found, expected)
        where = storages(found)
        assert where["head.weight"] == where["h.1.0.weight"]
        assert len(set(where.values())) == len(where) - 1
        assert found._metadata == Odd().state_dict()._metadata
        for path in ("h", "h.0", "h.1.1", "norm", "head"):
            part = {
                name.removeprefix(path + "."): value for name, value in expected.items() if name.startswith(path + ".")
            }
            same(model.get_submodule(path).state_dict(), part)
        same(nn.ModuleDict({"own": model.h[1]}).state_dict(prefix="a."), {
            f"a.own.{name}": value for name, value in model.h[1].state_dict().items()
        })  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_says_the_weights_of_the_last_step(dtype, settings):
    """A step that goes on under the next forward, or is on its way to disk, counts.

    The oracle is torch's AdamW on a plain copy in fp32. Gradients have the same bits where forward has, so that an
    update differs by its rounding: 2^-20 of at most lr = 1e-3, and half a unit of the weight, at most 2^-23, for either
    side and step. bf16 rounds weights to 2^-8 and so also the gradients, of which Adam keeps the sign: an update
    differs by at most 2 lr each step.
    """
    model = build("gpt")
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    config = settings(dtype)
    config["optimizer"]["params"]["weight_decay"] = 0.0
    before = None
    with started(model, config=config) as engine:
        for step in range(3):
            train(engine, step)
            found = {name: value.float().clone() for name, value in model.state_dict().items()}
            optimizer.zero_grad()
            plain(ids(step)).backward()
            optimizer.step()
            for name, value in plain.state_dict().items():
                steps = step + 1
                bound = (
                    steps * (1e-3 * 2**-20 + 2**-22) if dtype == "fp32" else steps * 2e-3 + 2**-8 * value.abs().max()
                )
                assert (found[name] - value).abs().max() <= bound, (step, name)
            assert before is None or not torch.equal(found["wte.weight"], before["wte.weight"])
            before = found
        assert engine.parts.plan.params_always_full or not any(param.numel() for param in model.parameters())


def test_a_dict_outlives_steps_and_its_engine(settings):
    """At stage 3 it is a copy that stays as it is; else it is the live weights, as in torch, and its memory stays."""
    model = build("gpt")
    with started(model, config=settings()) as engine:
        train(engine)
        state = model.state_dict()
        kept = {name: value.clone() for name, value in state.items()}
        train(engine, 1)
        now = {name: value.clone() for name, value in model.state_dict().items()}
        assert not torch.equal(now["wte.weight"], kept["wte.weight"])
        expected = now if engine.parts.plan.params_always_full else kept
        same({name: value.clone() for name, value in state.items()}, {name: expected[name] for name in state})
    same(state, {name: expected[name] for name in state})


def test_states_are_asked_for_anywhere(stage3):
    """In forward, in evaluation, inside GatheredParameters with its changes, and in a backward."""
    found = {}

    class Asks(nn.Linear):
        def forward(self, x):
            found[torch.is_grad_enabled()] = self.state_dict() | {"other": other.state_dict()["weight"]}
            return super().forward(x)

    other = nn.Linear(4, 4)
    model = nn.Sequential(Asks(4, 4), nn.ModuleList([other, nn.Linear(4, 4)])[0])
    expected = copy.deepcopy(nn.Sequential.state_dict(model))
    own = {"weight": expected["0.weight"], "bias": expected["0.bias"], "other": expected["1.weight"]}
    with started(model, config=stage3) as engine:
        with torch.no_grad():
            engine(torch.rand(2, 4))
        loss = engine(torch.rand(2, 4)).sum()
        model[1].weight.register_hook(lambda grad: found.__setitem__("backward", model.state_dict()))
        engine.backward(loss)
        same(found["backward"], expected)
        for each in (True, False):
            same(found[each], own)
        with zero.GatheredParameters(model, modifier_rank=0):
            with torch.no_grad():
                model[0].bias.fill_(7)
            assert torch.equal(model.state_dict()["0.bias"], torch.full((4,), 7.0))
            assert model.state_dict(keep_vars=True)["0.bias"] is model[0].bias
        assert torch.equal(model.state_dict()["0.bias"], torch.full((4,), 7.0))
        assert_released(engine)


def test_parameters_themselves_are_refused_while_empty(stage3):
    model = build("gpt")
    with (
        started(model, config=stage3),
        pytest.raises(ModelError, match=r"keep_vars=True\): wte.weight .* leave keep_vars out"),
    ):
        model.state_dict(keep_vars=True)


def test_a_failing_save_leaves_parameters_released(stage3):
    class Fails(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            raise OSError("disk full")

    model = nn.Sequential(nn.Linear(4, 4), Fails(4, 4))
    with started(model, config=stage3) as engine:
        with pytest.raises(OSError, match="disk full"):
            model.state_dict()
        assert_released(engine)


def test_a_dict_that_is_filled_again_has_the_new_values(stage3):
    """Catches: a tie that is looked up in what an earlier call has left in the dict."""
    model = build("gpt")
    with started(model, config=stage3) as engine:
        state = {}
        model.state_dict(destination=state, prefix="a.")
        train(engine)
        model.state_dict(destination=state, prefix="b.")
        now = model.state_dict()
        same({name: state[f"b.{name}"] for name in now}, now)
        assert not torch.equal(state["a.wte.weight"], state["b.wte.weight"])
        assert set(storages(now).values()).isdisjoint(storages(model.state_dict()).values())


@pytest.mark.parametrize("family", ["hf-gpt2", "hf-llama", "hf-t5"])
def test_save_pretrained_writes_the_weights(family, settings, tmp_path):
    model = build(family)
    plain = copy.deepcopy(model).eval()
    with started(model, config=settings()):
        model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    same(again.state_dict(), plain.state_dict())
    batch = {"input_ids": ids(), "labels": ids()}
    assert torch.equal(loss_of(again(**batch)), loss_of(plain(**batch)))


def test_torch_and_safetensors_save_the_weights(settings, tmp_path):
    from safetensors.torch import load_model, save_model

    model = build("gpt")
    expected = copy.deepcopy(model.state_dict())
    with started(model, config=settings()) as engine:
        file = io.BytesIO()
        torch.save(engine.state_dict(), file)
        save_model(model, tmp_path / "model.safetensors")
    file.seek(0)
    same(torch.load(file), {f"module.{name}": value for name, value in expected.items()})
    fresh = build("gpt", seed=5)
    load_model(fresh, tmp_path / "model.safetensors")
    same(fresh.state_dict(), expected)


def test_modules_are_their_own_again(settings):
    model = Odd()
    with started(model, config=settings()):
        model.state_dict()
    assert "_save_to_state_dict" not in vars(model.head)
    if not any(param.numel() for param in model.parameters()):
        with pytest.raises(ModelError, match="lost its weights when its engine was destroyed"):
            model.state_dict()


def test_a_class_that_copies_itself_keeps_its_method(stage3):
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            made = Own(self.in_features, self.out_features)
            memo[id(self)] = made
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return made

    model = Own(4, 4)
    expected = copy.deepcopy(model.state_dict())
    with started(model, config=stage3), zero.GatheredParameters(model):
        copied = copy.deepcopy(model)
    same(copied.state_dict(), expected)


def test_exact_values_are_asked_for_as_before(stage3):
    model = build("gpt")
    expected = copy.deepcopy(model.state_dict())
    with started(model, config=stage3) as engine:
        same(engine.module_state_dict(), expected)
        engine.load_module_state_dict({name: value + 1 for name, value in expected.items()})
        assert torch.equal(zeroxide.safe_get_full_fp32_param(model.norm.bias), expected["norm.bias"] + 1)
        assert torch.equal(model.state_dict()["norm.bias"], expected["norm.bias"] + 1)
