"""`DeepSpeedConfig` has the values that DeepSpeed 0.19.8's own has, written down from it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from zeroxide.errors import ConfigError
from zeroxide.integrations.deepspeed.config import DeepSpeedConfig
from zeroxide.integrations.deepspeed.offload_states import OffloadDeviceEnum

CASES = [
    (
        {
            "train_batch_size": 16,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "nvme", "nvme_path": "/tmp"},
                "offload_optimizer": {"device": "cpu"},
            },
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}},
            "wall_clock_breakdown": True,
            "steps_per_print": 5,
        },
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 4,
            "steps_per_print": 5,
            "gradient_clipping": 0.5,
            "zero_enabled": True,
            "zero_optimization_stage": 3,
            "optimizer_name": "adamw",
            "optimizer_params": {"lr": 0.001},
            "scheduler_name": "WarmupLR",
            "scheduler_params": {"warmup_num_steps": 7},
            "wall_clock_breakdown": True,
        },
        ("nvme", "cpu"),
        (False, 0.0, True),
    ),
    (
        {
            "train_micro_batch_size_per_gpu": 3,
            "fp16": {"enabled": True, "loss_scale": 128},
            "zero_optimization": {"stage": 1},
        },
        {
            "train_batch_size": 3,
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_enabled": True,
            "zero_optimization_stage": 1,
            "optimizer_name": None,
            "optimizer_params": None,
            "scheduler_name": None,
            "scheduler_params": None,
            "wall_clock_breakdown": False,
        },
        (None, None),
        (True, 128.0, False),
    ),
    (
        {"train_micro_batch_size_per_gpu": 2},
        {"train_batch_size": 2, "zero_enabled": False, "zero_optimization_stage": 0, "steps_per_print": None},
        (None, None),
        (False, 0.0, False),
    ),
]
"""A config, attributes, homes of parameters and optimizer state, and (fp16, its loss scale, bf16)."""


@pytest.mark.parametrize(("config", "expected", "homes", "precision"), CASES)
def test_attributes_are_deepspeeds(config, expected, homes, precision):
    found = DeepSpeedConfig(config)
    common = {"world_size": 1, "global_rank": 0, "managed_gradient_accumulation": True, "dataloader_drop_last": False}
    for name, value in (expected | common).items():
        assert getattr(found, name) == value, name
    zero = found.zero_config
    assert zero.stage == expected["zero_optimization_stage"]
    assert tuple(each and each.device.value for each in (zero.offload_param, zero.offload_optimizer)) == homes
    if homes[0] == "nvme":
        assert zero.offload_param.device is OffloadDeviceEnum.nvme
        assert str(zero.offload_param.nvme_path) == "/tmp"
    assert (found.float16_config.enabled, found.float16_config.loss_scale, found.bfloat16_config.enabled) == precision
    assert found._param_dict == config


def test_a_file_and_ranks_that_an_object_tells_of(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train_batch_size": 12}))
    found = DeepSpeedConfig(str(path), SimpleNamespace(get_data_parallel_world_size=lambda: 4))
    assert (found.world_size, found.train_micro_batch_size_per_gpu) == (4, 3)
    group = SimpleNamespace(size=lambda: 2)
    mesh = SimpleNamespace(get_group=lambda mesh_dim: group if mesh_dim == "data_parallel" else None)
    assert DeepSpeedConfig(path, mesh_device=mesh).train_micro_batch_size_per_gpu == 6


def test_what_is_not_built_is_refused_by_name(tmp_path):
    found = DeepSpeedConfig({"train_batch_size": 2})
    with pytest.raises(
        AttributeError, match=r"DeepSpeedConfig\.autotuning_config is not built in zeroxide: the config"
    ):
        print(found.autotuning_config)
    with pytest.raises(ConfigError, match="train_batch_siez"):
        DeepSpeedConfig({"train_batch_siez": 2})
    with pytest.raises(ConfigError, match=r"none\.json"):
        DeepSpeedConfig(tmp_path / "none.json")
