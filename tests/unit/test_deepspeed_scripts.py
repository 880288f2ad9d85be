"""Rows of docs/deepspeed.md about batch sizes, accumulation and the engine's methods: what a script sees."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from running import started
from safetensors.torch import load_file
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.errors import CheckpointError, ConfigError, ModelError

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "zeroxide": {"threads": 1}}
STAGES = [0, 1, 2, 3]
X = torch.ones(2, 4)


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def one(engine, factor=1.0):
    engine.backward(engine(X).sum() * factor)
    engine.step()


def test_batch_size():
    """Training needs no number; what would have to make one up is refused. Catches: a batch size of 1 by default."""
    for more in ({"config": ADAM}, {"lr": 0.01}):
        with started(linear(), **more) as engine:
            one(engine)
            assert engine.global_steps == 1
            for ask in (
                engine.train_batch_size,
                engine.train_micro_batch_size_per_gpu,
                engine.get_batch_info,
                lambda engine=engine: engine.global_samples,
                lambda engine=engine: engine.set_train_batch_size(4),
            ):
                with pytest.raises(ConfigError, match=r"no batch size.*train_micro_batch_size_per_gpu"):
                    ask()
        with pytest.raises(ConfigError, match="no batch size"):
            zeroxide.initialize(model=linear(), training_data=[X, X], **more)
    with started(linear(), config=ADAM | {"train_batch_size": 6, "gradient_accumulation_steps": 3}) as engine:
        for _ in range(6):
            one(engine)
        assert engine.get_batch_info() == (6, 2, 3)
        assert engine.global_samples == 12


def test_wrong_batch():
    wrong = {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    with pytest.raises(ConfigError, match="train_batch_size = 7 is not"):
        zeroxide.initialize(model=linear(), config=ADAM | wrong)
    with started(linear(), config=ADAM) as engine:
        with pytest.raises(ValueError, match=r"scalar loss, got shape \(2, 2\)"):
            engine.backward(engine(X))
        one(engine)
        assert engine.was_step_applied()


def test_set_batch_size():
    """Micro-batches of 2: windows of 1, then 3, then 2. Catches: a window counted from the beginning of the run, which
    after one step would end the first window of 3 a micro-batch early, and gradients still divided by the old number.
    """
    model = linear()
    options = ADAM | {"train_batch_size": 2, "gradient_clipping": 0}
    with started(model, config=options) as engine:
        one(engine)
        engine.set_train_batch_size(6)
        assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (6, 3)
        seen = []
        for number in range(6):
            loss = engine(X).sum()
            if number % 2:
                loss.backward()
            else:
                engine.backward(loss)
            seen.append(engine.is_gradient_accumulation_boundary())
            if number == 1:
                with pytest.raises(ConfigError, match="after 1 of 3 micro-batches"):
                    engine.set_train_batch_size(2)
            engine.step()
        assert seen == [False, False, True] * 2
        # Each micro-batch has the same gradient, 2 for every weight and bias, so that a third of three is that again.
        assert engine.get_global_grad_norm() == pytest.approx(2 * math.sqrt(10), rel=1e-6)
        assert engine.global_samples == 2 + 6 + 6
        engine.set_train_micro_batch_size(5)
        assert engine.get_batch_info() == (15, 5, 3)
        engine.set_train_batch_size(10)
        assert engine.get_batch_info() == (10, 5, 2)
        for wrong in (7, 0, -5, 2.5, True):
            with pytest.raises(ConfigError, match="train_batch_size"):
                engine.set_train_batch_size(wrong)


def test_unmanaged_boundary():
    options = ADAM | {"managed_gradient_accumulation": False, "gradient_accumulation_steps": 4, "train_batch_size": 8}
    seen = []
    with started(linear(), config=options) as engine:
        inner = engine.optimizer._apply
        engine.optimizer._apply = lambda: (seen.append(engine.is_gradient_accumulation_boundary()), inner())
        for _ in range(3):
            engine.backward(engine(X).sum())
            assert not engine.is_gradient_accumulation_boundary()
        engine.step()
        assert not engine.is_gradient_accumulation_boundary()
        assert (seen, engine.global_steps) == ([True], 1)
        assert engine.global_samples == 3 * 2, "the micro-batches that there were"


def test_batch_info():
    with started(linear(), config=ADAM | {"train_batch_size": 8, "gradient_accumulation_steps": 2}) as engine:
        assert engine.get_batch_info() == (8, 4, 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_no_sync(stage):
    """Two equal micro-batches, the first inside: the gradient of both, 2 for every weight and bias."""
    options = ADAM | {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2, "gradient_clipping": 0}
    with started(linear(), config=options) as engine:
        with engine.no_sync():
            one(engine)
        one(engine)
        assert engine.global_steps == 1
        assert engine.get_global_grad_norm() == pytest.approx(2 * math.sqrt(10), rel=1e-6)


def test_nothing_to_load(tmp_path, caplog):
    """Catches: a raise where nothing was saved, and silence where something was."""
    missing, empty, foreign = tmp_path / "missing", tmp_path / "empty", tmp_path / "foreign"
    empty.mkdir()
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    model = linear()
    with started(model, config=ADAM) as engine:
        one(engine)
        before = zeroxide.safe_get_full_fp32_param(model.weight)
        for place in (missing, empty, foreign):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "zeroxide"):
                assert engine.load_checkpoint(place) == (None, None)
            assert [line for line in caplog.messages if "no checkpoint was loaded" in line and str(place) in line]
        assert engine.global_steps == 1
        assert torch.equal(zeroxide.safe_get_full_fp32_param(model.weight), before)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            engine.load_checkpoint(empty, tag="step-5")
        engine.save_checkpoint(tmp_path / "some", tag="one", save_latest=False)
        with pytest.raises(CheckpointError, match="give tag='one'"):
            engine.load_checkpoint(tmp_path / "some")
        (tmp_path / "some" / "latest").write_text("two")
        with pytest.raises(CheckpointError, match="no checkpoint 'two'"):
            engine.load_checkpoint(tmp_path / "some")
        with pytest.raises(CheckpointError, match="is a file"):
            engine.load_checkpoint(foreign / "notes.txt")
        assert engine.load_checkpoint(tmp_path / "some", tag="one")[1] == {}


@pytest.mark.parametrize("stage", STAGES)
def test_grad_norm(stage):
    """The gradient is 2 for eight weights and two biases."""
    options = ADAM | {"zero_optimization": {"stage": stage}}
    with started(linear(), config=options) as engine:
        assert engine.get_global_grad_norm() is None
        one(engine)
        norm = engine.get_global_grad_norm()
        assert isinstance(norm, torch.Tensor)
        assert (norm.shape, norm.dtype) == ((), torch.float64)
        assert norm.item() == pytest.approx(2 * math.sqrt(10), rel=1e-6)
        one(engine, math.inf)
        assert engine.get_global_grad_norm() == math.inf
        one(engine, math.nan)
        assert engine.get_global_grad_norm() == math.inf
    unchecked = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    with started(linear().bfloat16(), config=options | unchecked) as engine:
        engine.backward(engine(X.bfloat16()).float().sum() * math.nan)
        engine.step()
        assert engine.was_step_applied()
        assert math.isnan(engine.get_global_grad_norm())


@pytest.mark.parametrize("stage", STAGES)
def test_no_optimizer(stage, tmp_path):
    """Catches: a refusal, memory for gradients and state that nothing uses, and a model left frozen."""
    model, plain = linear(), linear()
    options = {"zero_optimization": {"stage": stage}, "zeroxide": {"threads": 1}}
    engine, optimizer, _, schedule = zeroxide.initialize(model=model, config=options)
    assert (optimizer, schedule) == (None, None)
    assert torch.equal(engine(X), plain(X))
    assert engine.plan().buckets["gradients"] == engine.plan().buckets["optimizer"] == 0
    for call in (
        lambda: engine.backward(engine(X.clone().requires_grad_()).sum()),
        engine.step,
        lambda: engine.save_checkpoint(tmp_path / "out"),
        lambda: engine.load_checkpoint(tmp_path / "out"),
    ):
        with pytest.raises(ModelError, match="without an optimizer"):
            call()
    saved = engine.save_16bit_model(tmp_path / "model")
    assert torch.equal(load_file(saved)["weight"], plain.weight)
    engine.destroy()
    assert all(param.requires_grad for param in model.parameters())
    with pytest.raises(ConfigError, match="a schedule needs an optimizer"):
        zeroxide.initialize(model=linear(), config=options | {"scheduler": {"type": "WarmupLR"}})
    other = linear()
    with pytest.raises(ConfigError):
        zeroxide.initialize(model=other, config=options, training_data=[X])
    assert all(param.requires_grad for param in other.parameters())


def test_steps_per_print(capsys):
    for options, lines in ((ADAM, 0), (ADAM | {"steps_per_print": 5}, 4)):
        with started(linear(), config=options) as engine:
            assert engine.steps_per_print() == (None if not lines else 5)
            for _ in range(20):
                one(engine)
        assert capsys.readouterr().out.count("[zeroxide] step") == lines


def test_eval():
    with started(linear(), config=ADAM) as engine:
        assert engine.eval() is engine
        assert (engine.training, engine.module.training) == (False, False)
        assert engine.train() is engine
        assert (engine.training, engine.module.training) == (True, True)


@pytest.mark.parametrize("stage", STAGES)
def test_full_state(stage):
    plain = linear()
    with started(linear(), config=ADAM | {"zero_optimization": {"stage": stage}}) as engine:
        found = engine.module_state_dict()
    assert {name: tuple(value.shape) for name, value in found.items()} == {"weight": (2, 4), "bias": (2,)}
    assert all(torch.equal(value, found[name]) for name, value in plain.state_dict().items())


def test_save_16bit_model(tmp_path):
    plain = linear()
    with started(linear(), config=ADAM | {"zero_optimization": {"stage": 3}}) as engine:
        path = engine.save_16bit_model(tmp_path)
    assert path.name == "model.safetensors"
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in load_file(path).items())


@pytest.mark.parametrize("stage", STAGES)
def test_gathered_change(stage):
    model = linear().bfloat16()
    with started(model, config=ADAM | {"zero_optimization": {"stage": stage}}):
        with pytest.raises(ModelError, match="modifier_rank"), zero.GatheredParameters(model.weight), torch.no_grad():
            model.weight.fill_(1.0)
        with zero.GatheredParameters(model.weight, modifier_rank=0), torch.no_grad():
            model.weight.fill_(1.0)
        assert torch.equal(zeroxide.safe_get_full_fp32_param(model.weight), torch.ones(2, 4))


class Wrapped(nn.Module):
    """As PEFT's ModulesToSaveWrapper: the original is frozen, and a copy of it is trained."""

    def __init__(self, original):
        super().__init__()
        assert all(param.numel() or not hasattr(param, "ds_numel") for param in original.parameters()), (
            "imports deepspeed"
        )
        self.original_module = original.requires_grad_(False)
        self.copied = copy.deepcopy(original).requires_grad_(True)

    def forward(self, x):
        return self.copied(x)


def test_copied_modules():
    """Catches: empty parameters, or ones that are still kept, in a copy made where the weights are gathered."""
    with zero.Init():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with zero.GatheredParameters(model.parameters(), modifier_rank=0):
        model[1] = Wrapped(model[1])
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert torch.equal(model[1].copied.weight, plain[1].weight)
    with started(model, config=ADAM | {"zero_optimization": {"stage": 3}}) as engine:
        assert torch.equal(engine(X), plain(X))
        one(engine)
        assert not torch.equal(engine(X), plain(X))
        assert torch.equal(engine.module_state_dict()["1.original_module.weight"], plain[1].weight)
