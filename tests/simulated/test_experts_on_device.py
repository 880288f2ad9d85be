"""Layers of experts on a device: the bits of host memory, with tokens routed by kernels, and no access unordered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import batches, build, loss_of, train_plain
from launching import run_ranks

import zeroxide
from simulated import engines

PLACES: dict[str, dict[str, Any]] = {
    "on-device": {"stage": 3},
    "resident": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "transient": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
}


@pytest.fixture(autouse=True)
def with_kernels(sim):
    sim.set_delay(0, 100, seed=8)
    with engines.followed(kernels=True):
        yield
        assert [str(each) for each in sim.races()] == []


def train(family: str, where: str, place: str, dtype: str, folder: Path) -> tuple[list[float], list[float], dict]:
    """Losses, norms, and the weights after two steps of two micro-batches."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 0.5,
        "steps_per_print": None,
        "zero_optimization": PLACES[place],
        "zeroxide": {"threads": 1, "device": where},
        "bf16": {"enabled": dtype == "bf16"},
        **({} if family == "moe" else {"expert_parallel": {"enabled": True}}),
    }
    engine = zeroxide.initialize(model=build(family, 1), config=config)[0]
    losses, norms = [], []
    for step in range(2):
        for micro in range(2):
            loss = loss_of(engine, batches(step, 0, micro, 1).to(where))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    weights = {name: value.cpu() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return losses, norms, weights


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["moe", "mixtral"])
def test_a_model_of_experts_has_the_bits_of_host_memory(family, place, dtype, tmp_path):
    """Catches: index tensors that stay in host memory, tokens routed by torch, a route in another order."""
    there, here = (train(family, where, place, dtype, tmp_path) for where in ("sim", "cpu"))
    if family == "moe":
        assert {each.rsplit("_", 1)[0] for each in engines.launched()} == {"zx_gather_rows", "zx_combine_rows"}
    assert there[0] == here[0]
    assert there[1] == here[1]
    assert there[2].keys() == here[2].keys()
    assert [name for name, value in here[2].items() if not torch.equal(there[2][name], value)] == []
    if dtype == "fp32":
        # Plain PyTorch sums in another order: 2e-6 of losses around 4, as in `test_experts_ranks.py`.
        assert here[0] == pytest.approx(train_plain(family, 1, 2)[0][0], rel=2e-6)


CASES = [
    ("moe", "1", "none", "cpu", "fp32"),
    ("moe", "2", "none", "nvme", "bf16"),
    ("moe", "3", "cpu", "cpu", "bf16"),
    ("mixtral", "3", "none", "none", "fp32"),
    ("mixtral", "3", "nvme", "nvme", "bf16"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ranks_with_devices_share_experts_with_the_bits_of_the_host(case):
    """Catches: tokens that are sent before the device has computed them, order and positions in host memory, weights of
    another rank, a tensor of the wrong device given to the group."""
    for rank, result in enumerate(run_ranks(2, Path(__file__).with_name("device_expert_ranks.py"), list(case))):
        assert result.code == 0, f"rank {rank}: {result.out[-1000:]}\n{result.err[-3000:]}"
        assert result.out.splitlines()[-1] == "same"
