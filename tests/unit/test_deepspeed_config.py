"""Rows of docs/deepspeed.md about what a config may say."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
import torch
from running import started
from torch import nn

import zeroxide
from zeroxide.config import load
from zeroxide.distributed import log_summary, process_group
from zeroxide.errors import ConfigError, RanksError
from zeroxide.optim import DeepSpeedCPULion, Lion

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}


def refused(config, **more):
    with pytest.raises(ConfigError) as caught:
        load(config, **more)
    return str(caught.value)


def test_compute_grad_norm():
    off = {"stage": 1, "compute_grad_norm": False}
    torch.manual_seed(0)
    with started(nn.Linear(4, 2), config=ADAM | {"zero_optimization": off, "gradient_clipping": 0}) as engine:
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        assert engine.was_step_applied()
        assert engine.get_global_grad_norm() is None
    for stage in (0, 3):
        line = refused({"zero_optimization": {"stage": stage, "compute_grad_norm": False}, "gradient_clipping": 0})
        assert f"needs zero_optimization.stage 1 or 2, got {stage}" in line
    assert "needs gradient_clipping = 0, got 1.0, the default" in refused({"zero_optimization": off})
    assert "got 0.5" in refused({"zero_optimization": off, "gradient_clipping": 0.5})
    assert load({"zero_optimization": off}, gradient_clipping=0).zero.compute_grad_norm is False
    assert load({"zero_optimization": {"stage": 3, "compute_grad_norm": True}}).zero.compute_grad_norm


def test_parameter_alignment():
    for value in (True, False):
        found = load({"zero_optimization": {"parameter_alignment": value}}).no_effect
        assert [name for name, _ in found] == ["zero_optimization.parameter_alignment"]
        assert "64 elements" in found[0][1]


def test_unknown_keys():
    for key in ("seed", "_comment", "zero_optimization.stage", "gradient_cliping"):
        assert f'unknown key "{key}"' in refused({key: 1})
    assert 'the nearest known key is "gradient_clipping"' in refused({"gradient_cliping": 1})


def test_timeout(monkeypatch):
    """deepspeed/constants.py:19."""
    limits = []
    monkeypatch.setattr(process_group, "_make_group", lambda launch, backend, limit, method: limits.append(limit))
    zeroxide.init_distributed(verbose=False)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "3")
    zeroxide.init_distributed(verbose=False)
    zeroxide.init_distributed(verbose=False, timeout=7)
    zeroxide.init_distributed(verbose=False, timeout=timedelta(hours=1))
    assert [limit.total_seconds() for limit in limits] == [600, 180, 7, 3600]
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "soon")
    with pytest.raises(RanksError, match="DEEPSPEED_TIMEOUT: expected a whole number of minutes from 1 on, got 'soon'"):
        zeroxide.init_distributed(verbose=False)


def test_param_dtype():
    assert load({"data_types": {"param_dtype": "fp32"}}, own_dtype=lambda: "bf16").precision.dtype == "fp32"
    assert load({"data_types": {"param_dtype": "bf16"}, "bf16": {"enabled": True}}).precision.dtype == "bf16"
    assert load({"data_types": {"param_dtype": "fp16"}}, dtype="fp16").precision.dtype == "fp16"
    line = refused({"data_types": {"param_dtype": "fp32"}, "bf16": {"enabled": True}})
    assert 'data_types.param_dtype = "fp32" contradicts bf16.enabled' in line
    assert "needs bf16.enabled = true" in refused({"data_types": {"param_dtype": "bf16"}})


def test_off_sections():
    for section in (
        {"monitor_config": {"tensorboard": {"enabled": False}, "csv_monitor": {"enabled": False}}},
        {"monitor_config": {}},
    ):
        assert [name for name, _ in load(section).no_effect] == list(section)
    for section in ({"monitor_config": {"wandb": {"enabled": True}}},):
        assert "not built yet" in refused(section)
    for section in ({"autotp_size": 1}, {"autotp_size": 0, "enabled": False}, {"tp": {"tp_size": 1}}):
        assert load({"tensor_parallel": section}).mesh is None
    assert "expected an integer" in refused({"tensor_parallel": {"autotp_size": True}})
    assert "does not divide the 1 ranks" in refused({"tensor_parallel": {"autotp_size": 2}})


def test_lenient_values():
    assert load({"zero_optimization": True}).zero.stage == 1
    assert load({"zero_optimization": False}).zero.stage == 0
    assert [load({"zero_optimization": {"stage": f"{stage}"}}).zero.stage for stage in range(4)] == [0, 1, 2, 3]
    assert (
        load({"bf16": {"enabled": "true"}}).precision.dtype
        == load({"bf16": {"enabled": "True"}}).precision.dtype
        == "bf16"
    )
    assert load({"bf16": {"enabled": "false"}}).precision.dtype == "fp32"
    assert load({"wandb": {"enabled": "false", "project": "x"}}).no_effect
    assert load({"wandb": {"enabled": "true"}}).monitor.enabled
    assert "expected true or false" in refused({"bf16": {"enabled": "maybe"}})
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    model = nn.ParameterList([a, b])
    rates = {"warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [0.2, 0.3], "warmup_num_steps": 2, "warmup_type": "linear"}
    scheduled = ADAM | {"scheduler": {"type": "WarmupLR", "params": rates}}
    with started(model, config=scheduled, model_parameters=[{"params": [a]}, {"params": [b]}]) as engine:
        assert engine.get_lr() == [0.0, 0.1]
        engine.lr_scheduler.step()
        engine.lr_scheduler.step()
        # Iteration 1 of 2: half of the way.
        assert engine.get_lr() == pytest.approx([0.1, 0.2], rel=1e-12)


def test_falling_warmup():
    for low, high in ((0.2, 0.1), ([0.0, 0.2], [0.1, 0.1]), (0.2, [0.3, 0.1])):
        params = {"warmup_min_lr": low, "warmup_max_lr": high}
        assert "warmup_min_lr" in refused({"scheduler": {"type": "WarmupLR", "params": params}})

    decay = {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_min_lr": 0.01}}
    assert "is above scheduler.params.warmup_max_lr = 0.001, its default" in refused({"scheduler": decay})


def test_not_built():
    for key, config in {
        "bf16.bf16_master_weights_and_grads": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "lower_precision_safe_modules": {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}},
        "partition_activations": {"activation_checkpointing": {"partition_activations": True}},
        "optimizer.type": {"optimizer": {"type": "Lamb"}},
    }.items():
        line = refused(config)
        assert key in line
        assert "not built yet" in line


def test_monitors(tmp_path):
    csv = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    for rows in (2, 3):
        with started(nn.Linear(4, 2), config=ADAM | {"csv_monitor": csv}) as engine:
            loss = engine(torch.ones(1, 4)).sum()
            engine.backward(loss)
            engine.step()
        found = (tmp_path / "job" / "Train_Samples_train_loss.csv").read_text().splitlines()
        assert found[0] == "step,train_loss"
        assert len(found) == rows
        assert float(found[-1].split(",")[1]) == loss.item()
    assert "Comet (tensorboard, wandb, csv_monitor and zeroxide.log are there)" in refused({"comet": {"enabled": True}})


def test_flops_profiler(capsys):
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.GELU())
    wanted = {"enabled": True, "profile_step": 0, "module_depth": 0}
    with started(model, config=ADAM | {"flops_profiler": wanted, "gradient_accumulation_steps": 2}) as engine:
        for _ in range(2):
            engine.backward(engine(torch.ones(3, 4)).sum())
            engine.step()
    out = capsys.readouterr().out
    assert out.count("FLOPs profile at step 0") == 1
    assert f"fwd MACs {3 * 4 * 2} MACs" in " ".join(out.split())
    assert "Linear" not in out


def test_comms_logger():
    assert not load({"comms_logger": {"enabled": False, "verbose": True}}).comms_logger.enabled
    assert load({"comms_logger": {"enabled": True}}).comms_logger.enabled
    assert log_summary(return_dict=True) == {"summary": {}}


def test_wall_clock_breakdown(capsys):
    config = ADAM | {"wall_clock_breakdown": True, "gradient_accumulation_steps": 2}
    with started(nn.Linear(4, 2), config=config) as engine:
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 4)).sum())
            engine.step()
    lines = [line for line in capsys.readouterr().out.splitlines() if "time (ms)" in line]
    words = ("fwd_microstep: ", "fwd_microstep: ", "fwd: ")
    assert [line.startswith(f"[Rank 0] time (ms) | {word}") for line, word in zip(lines, words, strict=True)] == [
        True
    ] * 3
    assert all(each in lines[2] for each in ("bwd_allreduce: ", "optimizer_gradients: ", "optimizer_step: "))


def test_cpu_checkpointing(caplog):
    config = ADAM | {"activation_checkpointing": {"cpu_checkpointing": True}}
    assert load(config).activation_checkpointing.cpu_checkpointing
    with started(nn.Linear(4, 2), config=config) as engine:
        assert engine.device_traffic()["activations_down"] == 0
    assert any("cpu_checkpointing has no effect: the model computes in host memory" in each for each in caplog.messages)


def test_lion_betas():
    # deepspeed/ops/lion/fused_lion.py:36, deepspeed/ops/lion/cpu_lion.py:15
    assert load({"optimizer": {"type": "Lion"}}).optimizer.betas == (0.9, 0.999)
    assert DeepSpeedCPULion([nn.Parameter(torch.ones(1))]).param_groups[0]["betas"] == (0.9, 0.999)
    assert Lion([nn.Parameter(torch.ones(1))]).param_groups[0]["betas"] == (0.9, 0.99)


def test_adagrad_state():
    config = {"optimizer": {"type": "Adagrad", "params": {"lr": 0.01}}, "gradient_clipping": 0}
    with started(nn.Linear(4, 2), config=config) as engine:
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        weight = engine.module.weight
        assert (zeroxide.safe_get_full_optimizer_state(weight, "sum") == 1).all()
        with pytest.raises(ConfigError, match='expected "sum"'):
            zeroxide.safe_get_full_optimizer_state(weight, "exp_avg_sq")


def test_removed():
    for key in ("amp", "elasticity", "curriculum_learning", "compression_training", "eigenvalue", "nebula"):
        assert [name for name, _ in load({key: {"enabled": False}}).no_effect] == [key]
        line = refused({key: {"enabled": True}})
        assert "neither zeroxide nor DeepSpeed 0.19.8 has it" in line
        assert "not built" not in line
    for name in ("OneBitAdam", "OneBitLamb", "ZeroOneAdam"):
        line = refused({"optimizer": {"type": name}})
        assert "neither zeroxide nor DeepSpeed 0.19.8 has 1-bit optimizers" in line
        assert "zero_quantized_gradients" in line
    assert "rows of an embedding" in refused({"sparse_gradients": True})
    assert "MiCS" in refused({"zero_optimization": {"stage": 3, "mics_shard_size": 2}})


def test_hpz():
    """That training in groups has the bits of plain sharding is shown in tests/distributed/test_hybrid_sharding.py."""
    found = load({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, world_size=4)
    assert found == dataclasses.replace(
        load({"zeroxide": {"mesh": {"dp_shard": 2}}, "zero_optimization": {"stage": 3}}, world_size=4),
        source=found.source,
    )
    assert (found.mesh.dp_replicate, found.mesh.dp_shard) == (2, 2)
    assert "needs zero_optimization.stage 3" in refused({"zero_optimization": {"zero_hpz_partition_size": 2}})


def test_quantised():
    """What they do is shown in tests/distributed/test_quantised.py."""
    asked = {
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
        "zero_quantized_nontrainable_weights": True,
    }
    found = load({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2, **asked}}, world_size=4)
    assert found.zero.quantized_weights
    assert found.zero.quantized_gradients
    assert found.zero.quantized_frozen
    assert (found.mesh, found.zero.secondary) == (None, 2)
    for key in asked:
        assert f"{key} = true needs zero_optimization.stage 3, got 2" in refused(
            {"zero_optimization": {"stage": 2, key: True}}
        )
        assert load({"zero_optimization": {"stage": 1, key: False}}).zero.stage == 1
    nvme = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/d"}}
    assert "not built yet" in refused({"zero_optimization": nvme | {"zero_quantized_weights": True}})
    assert load({"zero_optimization": nvme | {"zero_quantized_gradients": True}}).zero.quantized_gradients
    assert load({"zero_optimization": {"stage": 3, **asked}}).no_effect == []
    torch.manual_seed(0)
    with started(nn.Linear(4, 2), config=ADAM | {"zero_optimization": {"stage": 3, **asked}}) as engine:
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        keys = [key for key, reason in engine.plan().quantisation.no_effect if "there is one rank" in reason]
        assert set(keys) == {f"zero_optimization.{key}" for key in asked}


def test_loco():
    """What it does is shown in tests/distributed/test_quantised.py."""
    zero = {"stage": 3, "zero_quantized_gradients": True}
    found = load({"zero_optimization": zero | {"zeropp_loco_param": {}}}).zero.feedback
    assert (found.beta, found.reset_steps) == (0.8, 1024)
    given = {"err_beta": 0.5, "reset_T": 7}
    found = load({"zero_optimization": zero | {"zeropp_loco_param": given}}).zero.feedback
    assert (found.beta, found.reset_steps) == (0.5, 7)
    assert load({"zero_optimization": zero}).zero.feedback is None
    assert "zero_quantized_gradients = true" in refused({"zero_optimization": {"stage": 3, "zeropp_loco_param": {}}})


def test_names():
    """Only that the error says what is missing: nothing here pretends to be there."""
    for name in ("utils", "comm", "ops", "runtime", "pipe", "get_accelerator", "DeepSpeedEngine"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(zeroxide, name)
    assert callable(zeroxide.safe_get_full_fp32_param)
