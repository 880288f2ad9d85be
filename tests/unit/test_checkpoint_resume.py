"""What goes on after a checkpoint is loaded, whole or in part."""

import os
import random

import numpy as np
import pytest
import torch
from checkpointing import PARTS, SCHEDULES, Model, assemble, assert_same, freeze, state, train
from safetensors import safe_open
from torch.optim import lr_scheduler

from zeroxide.errors import CheckpointError

# What goes on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on(make, tmp_path, name):
    def rates(engine, first, last):
        seen = []
        for step in range(first, last):
            train(engine, step, step + 1)
            seen.append((engine.get_lr(), [group["betas"] for group in engine.optimizer.param_groups]))
        return seen

    saver = make(lr_scheduler=SCHEDULES[name])
    seen = rates(saver, 0, 3)
    saver.save_checkpoint(tmp_path / "out")
    seen += rates(saver, 3, 6)
    assert len({str(each) for each in seen}) > 1
    loader = make(lr_scheduler=SCHEDULES[name], seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert rates(loader, 3, 6) == seen[3:]
    assert_same(state(loader), state(saver))


def test_a_plateau_schedule_goes_on(make, tmp_path):
    plateau = lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)  # noqa: E731
    saver, loader = make(lr_scheduler=plateau), make(lr_scheduler=plateau, seed=7)
    saver.save_checkpoint(tmp_path / "out")  # `best` is infinite
    loader.load_checkpoint(tmp_path / "out")
    assert loader.lr_scheduler.state_dict() == saver.lr_scheduler.state_dict()
    assert loader.lr_scheduler.best == float("inf")


def test_hyperparameters_changed_by_hand_go_on(make, tmp_path):
    saver = make()
    saver.optimizer.param_groups[0].update({"lr": 3e-4, "betas": (0.8, 0.95), "weight_decay": 0.3})
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert loader.optimizer.hyperparameters() == saver.optimizer.hyperparameters()
    assert train(loader, 2, 4) == train(saver, 2, 4)


def test_generators_go_on(make, tmp_path):
    engine = make()
    random.gauss(0, 1)
    np.random.standard_normal()
    engine.save_checkpoint(tmp_path / "out")
    draw = lambda: (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn())  # noqa: E731
    expected = draw()
    engine.load_checkpoint(tmp_path / "out")
    assert draw() == expected
    before = torch.get_rng_state()
    engine.load_checkpoint(tmp_path / "out", load_module_only=True)
    assert torch.get_rng_state().equal(before)


def test_accumulation_goes_on_at_a_boundary(make, tmp_path):
    saver = make(gradient_accumulation_steps=2)
    train(saver, 0, 6)
    assert (saver.global_steps, saver.micro_steps) == (3, 6)
    saver.save_checkpoint(tmp_path / "out")
    same, other = make(gradient_accumulation_steps=2), make(gradient_accumulation_steps=4)
    same.load_checkpoint(tmp_path / "out")
    other.load_checkpoint(tmp_path / "out")
    assert (same.global_steps, same.micro_steps) == (3, 6)
    train(other, 6, 9)
    assert other.global_steps == 3
    train(other, 9, 10)
    assert other.global_steps == 4


def test_gradients_of_before_are_not_used_after_loading(make, tmp_path):
    saver = make()
    train(saver, 0, 1)
    saver.save_checkpoint(tmp_path / "out")
    loader = make()
    loader.backward(loader(torch.zeros(2, 8, dtype=torch.long)))
    loader.load_checkpoint(tmp_path / "out")
    assert train(loader, 1, 3) == train(saver, 1, 3)
    assert_same(state(loader), state(saver))


def test_loading_between_forward_and_backward_leaves_a_usable_engine(make, tmp_path):
    saver = make("nvme", "split")
    train(saver, 0, 1)
    saver.save_checkpoint(tmp_path / "out")
    loader = make("nvme", "split", seed=7)
    pending = loader(torch.zeros(2, 8, dtype=torch.long))
    loader.load_checkpoint(tmp_path / "out")
    # Nothing may point at memory that the core has taken back.
    assert not any(param.numel() for param in loader.module.parameters())
    del pending
    assert train(loader, 1, 3) == train(saver, 1, 3)


# Parts of it -------------------------------------------------------------------------------------------------------


def test_weights_only(make, tmp_path):
    saver = make(lr_scheduler=SCHEDULES["StepLR"])
    train(saver, 0, 3)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(seed=7, lr_scheduler=SCHEDULES["StepLR"], lr=5e-3)
    train(loader, 0, 1)
    before = state(loader)
    loader.load_checkpoint(tmp_path / "out", load_module_only=True)
    there, after = state(saver), state(loader)
    for key, value in after.items():
        source = there if key[1] in ("weights", "buffer") else before
        assert_same({key: value}, {key: source[key]})


def test_weights_only_needs_no_other_files(make, tmp_path):
    saver = make()
    path = saver.save_checkpoint(tmp_path / "out")
    for file in path.glob("exp_avg*"):
        file.unlink()
    loader = make(seed=7)
    loader.load_checkpoint(tmp_path / "out", load_module_only=True)
    with pytest.raises(CheckpointError, match=r"exp_avg-00001\.safetensors is missing"):
        loader.load_checkpoint(tmp_path / "out")


def test_optimizer_without_schedule_keeps_the_new_schedule(make, tmp_path):
    saver = make(lr_scheduler=SCHEDULES["ExponentialLR"])
    train(saver, 0, 3)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(lr_scheduler=SCHEDULES["ExponentialLR"], lr=5e-3)
    loader.load_checkpoint(tmp_path / "out", load_lr_scheduler_states=False)
    assert loader.get_lr() == [5e-3]
    assert loader.lr_scheduler.last_epoch == 0
    assert loader.global_steps == 3
    moments = {key: value for key, value in state(saver).items() if key[1] in (*PARTS, "updates")}
    assert_same(moments, {key: state(loader)[key] for key in moments})


def test_schedule_without_optimizer(make, tmp_path):
    saver = make(lr_scheduler=SCHEDULES["ExponentialLR"])
    train(saver, 0, 3)
    saver.optimizer.param_groups[0]["weight_decay"] = 0.7
    saver.save_checkpoint(tmp_path / "out")
    loader = make(lr_scheduler=SCHEDULES["ExponentialLR"], seed=7)
    loader.load_checkpoint(tmp_path / "out", load_optimizer_states=False)
    assert loader.get_lr() == saver.get_lr()
    assert loader.optimizer.param_groups[0]["weight_decay"] == 0.1
    found = state(loader)
    assert not found["embed.weight", "exp_avg"].any()
    assert found["embed.weight", "updates"] == 0


@pytest.mark.parametrize("here", [("none", "fp32"), ("nvme", "split"), ("nvme", "fp32")], ids="-".join)
def test_frozen_parameters_that_were_left_out_stay(make, tmp_path, here, monkeypatch):
    from zeroxide.checkpoint import live_state

    monkeypatch.setattr(live_state.Staging.__init__, "__defaults__", (1000,))
    saver = make("nvme", "split", model=freeze(Model()))
    train(saver, 0, 2)
    path = saver.save_checkpoint(tmp_path / "out", exclude_frozen_parameters=True)
    with safe_open(path / "weights-00001.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith(("blocks.0.up", "blocks.1"))]  # noqa: SIM118
    torch.manual_seed(7)
    loader = make(*here, model=freeze(Model()), seed=8)
    before = state(loader)
    loader.load_checkpoint(tmp_path / "out")
    there, after = state(saver), state(loader)
    frozen = [name for name, param in freeze(Model()).named_parameters() if not param.requires_grad]
    assert len(frozen) == 8
    for key, value in after.items():
        source = before if key[0] in frozen and key[1] == "weights" else there
        assert_same({key: value}, {key: source[key]})
    assert not any(before[name, "weights"].equal(there[name, "weights"]) for name in frozen if "norm" not in name)
    # The live weights follow, not only what the core reports.
    losses = train(loader, 2, 4)
    assert losses != train(saver, 2, 4)


def test_frozen_parameters_are_stored_as_they_are_computed_with(make, tmp_path):
    saver = make("nvme", "split", model=freeze(Model()))
    losses = train(saver, 0, 2)
    path = saver.save_checkpoint(tmp_path / "out")
    weights, moments = assemble(path, "weights"), assemble(path, "exp_avg")
    expected = state(saver)
    assert weights["blocks.1.up.weight"].dtype == torch.bfloat16
    assert (
        weights["blocks.1.up.weight"]
        .float()
        .flatten()
        .view(torch.int32)
        .equal(expected["blocks.1.up.weight", "weights"])
    )
    assert weights["blocks.2.up.weight"].dtype == torch.float32
    assert "blocks.1.up.weight" not in moments
    loader = make("none", "fp32", model=freeze(Model()), seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), expected)
    losses += train(saver, 2, 4)
    assert train(loader, 2, 4) == losses[2:]


@pytest.mark.parametrize("here", ["none", "nvme"])
def test_parameters_unfrozen_since_start_with_zero_moments(make, tmp_path, here):
    saver = make("none", "split", model=freeze(Model()))
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(here, "split", seed=7)
    train(loader, 0, 1)
    loader.load_checkpoint(tmp_path / "out")
    there, here = state(saver), state(loader)
    for name in ("blocks.0.up.weight", "blocks.1.norm.weight"):
        assert here[name, "weights"].equal(there[name, "weights"])
        assert not here[name, "exp_avg"].any()
        assert not here[name, "exp_avg_sq"].any()
        assert here[name, "updates"] == 0
    assert here["blocks.2.up.weight", "exp_avg"].equal(there["blocks.2.up.weight", "exp_avg"])


def test_short_reads_go_on(make, tmp_path, monkeypatch):
    saver = make("none", "split", model=freeze(Model()))
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out", exclude_frozen_parameters=True)
    loader = make("nvme", "split", model=freeze(Model()))
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, views, at: preadv(file, [views[0][: max(1, len(views[0]) // 3)]], at)
    )
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), state(saver))
