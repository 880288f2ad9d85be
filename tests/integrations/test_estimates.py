"""DeepSpeed's estimates of memory: what an engine then takes, and what is printed."""

from __future__ import annotations

import pytest
import torch
from models import build
from running import started

from zeroxide.errors import ConfigError
from zeroxide.integrations.deepspeed import estimates


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_takes_what_was_estimated(stage, tmp_path):
    """Every byte of memory at the most and of disk, in two steps. Catches: another home or format than the engine's."""
    told = list(estimates.estimates(build("gpt"), stage, 1, 1))
    assert len(told) == {2: 2, 3: 3}[stage]
    for each in told:
        zero = {"stage": stage, "offload_optimizer": {"device": each.optimizer, "nvme_path": str(tmp_path)}}
        if each.param is not None:
            zero["offload_param"] = {"device": each.param, "nvme_path": str(tmp_path)}
        config = {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}, "zero_optimization": zero}
        with started(build("gpt"), config=config) as engine:
            for _ in range(2):
                ids = torch.randint(0, 61, (2, 12))
                engine.backward(engine(ids).float().square().mean())
                engine.step()
            assert each.memory == engine.memory()["total"]["peak"], each
            assert each.disk == engine.plan().disk_bytes, each


def test_what_is_printed(capsys):
    """Catches: a tied weight that counts twice, sizes of a model of nothing but numbers, options left out."""
    model = build("gpt")
    total, largest = estimates.model_to_params(model)
    assert total == sum(param.numel() for param in model.parameters())
    assert largest == max(sum(p.numel() for p in each.parameters(recurse=False)) for each in model.modules())
    estimates.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "zeroxide at stage 3 on the CPU, 1 host(s) with 2 rank(s) each, beside activations:"
    assert [line.rpartition("| ")[2] for line in lines[3:]] == [
        "offload_param=cpu, offload_optimizer=cpu",
        "offload_param=cpu, offload_optimizer=nvme",
        "offload_param=nvme, offload_optimizer=nvme",
    ]
    estimates.estimate_zero3_model_states_mem_needs_all_cold(total_params=10_000_000, largest_layer_params=3_000_000)
    assert "a model of 10 M parameters, 3 M in its largest layer" in capsys.readouterr().out
    estimates.estimate_zero2_model_states_mem_needs_all_cold(total_params=10_000_000, num_nodes=2)
    assert "stage 2 on the CPU, 2 host(s)" in capsys.readouterr().out
    for call, given in ((estimates.estimate_zero3_model_states_mem_needs_all_cold, (1000, 0)),):
        with pytest.raises(ConfigError, match="above 0"):
            call(*given)
    with pytest.raises(ConfigError, match="expected at least one"):
        estimates.estimate_zero2_model_states_mem_needs_all_live(model, num_gpus_per_node=0)
    estimates.estimate_zero2_model_states_mem_needs_all_live(model)
    assert capsys.readouterr().out.count("offload_optimizer") == 2
