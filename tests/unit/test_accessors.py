"""What scripts ask of an engine, and give it on their command line."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from running import started
from torch import nn

import zeroxide
from zeroxide.errors import ConfigError, ModelError

CONFIG = {
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.25,
    "steps_per_print": 7,
    "wall_clock_breakdown": True,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "betas": [0.8, 0.95]}},
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_settings_under_deepspeed_s_names(stage):
    with started(nn.Linear(4, 2), config=CONFIG | {"zero_optimization": {"stage": stage}}) as engine:
        assert engine.get_batch_info() == (6, 3, 2)
        assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (6, 3)
        assert engine.gradient_accumulation_steps() == 2
        assert engine.gradient_clipping() == 0.25
        assert engine.steps_per_print() == 7
        assert engine.wall_clock_breakdown() is True
        assert engine.get_lr() == [0.5]
        assert engine.get_mom() == [(0.8, 0.95)]
        assert engine.dp_world_size == 1
        assert engine.zero_optimization_stage() == stage
        assert engine.zero_optimization() is (stage > 0)
        assert engine.zero_optimization_partition_gradients() is (stage > 1)
        assert engine.zero_optimization_partition_weights() is (stage > 2)
    with started(nn.Linear(4, 2), config={"optimizer": {"type": "Adam"}}) as engine:
        assert engine.gradient_clipping() == 1.0
        assert engine.wall_clock_breakdown() is False


def test_states_that_scripts_move_off_the_device():
    """On the CPU nothing is on a device. Catches: a word of nobody's, and disk, taken without a word."""
    with started(nn.Linear(4, 2), config=CONFIG) as engine:
        engine.offload_states()
        engine.offload_states(include=["optim_states", "lp_params"], device="cpu", pin_memory=False, non_blocking=True)
        engine.optimizer.offload_states(device="none")
        engine.reload_states()
        engine.optimizer.reload_states(non_blocking=True)
        engine.empty_partition_cache()
        with pytest.raises(ConfigError, match=r"expected some of optim_states.*got states"):
            engine.offload_states(include=["states"])
        with pytest.raises(ConfigError, match="expected cpu or none, got nvme"):
            engine.offload_states(device="nvme")
    model = nn.Linear(4, 2).requires_grad_(False)
    with started(model, config={"train_batch_size": 1}) as engine:
        for call in (engine.offload_states, engine.reload_states):
            with pytest.raises(ModelError, match="this engine only evaluates"):
                call()


def test_a_rate_that_is_set_is_used():
    """At a rate of 0, without weight decay, nothing moves."""
    model = nn.Linear(4, 2)
    with started(model, config={"optimizer": {"type": "Adam"}}) as engine:
        for rate, moved in ((0.0, False), (0.1, True)):
            before = model.weight.detach().clone()
            engine.set_lr(rate)
            assert engine.get_lr() == [rate]
            engine.backward(engine(torch.ones(1, 4)).sum())
            engine.step()
            assert torch.equal(model.weight, before) is not moved
    frozen = nn.Linear(4, 2).requires_grad_(False)
    with started(frozen, config={}) as engine:
        engine.set_lr(0.1)
        assert (engine.get_lr(), engine.get_mom()) == ([], [])


def test_a_script_takes_its_config_from_the_command_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    parser = argparse.ArgumentParser()
    assert zeroxide.add_config_arguments(parser) is parser
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    assert args.deepspeed is True
    with started(nn.Linear(4, 2), args=args) as engine:
        assert engine.get_batch_info() == (6, 3, 2)
    assert vars(parser.parse_args([])) == {"deepspeed": False, "deepspeed_config": None}
