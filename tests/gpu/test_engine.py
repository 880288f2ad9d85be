"""The engine on a GPU: plain torch's gradients on it, the same bits wherever the state is, and the bytes that move."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Asked for when cuBLAS is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))

from models import FAMILIES, batches, build, loss_of

import zeroxide

HOMES = {
    "resident": {"stage": 2},
    "resident-disk": {"stage": 3, "offload_optimizer": "nvme"},
    "transient": {"stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"},
    "transient-disk": {"stage": 3, "offload_param": "nvme", "offload_optimizer": "nvme"},
}


@pytest.fixture(autouse=True)
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def config_of(home: str, folder: Path, device: torch.device, dtype: str = "fp32", **own) -> dict:
    zero = {
        key: value if key == "stage" else {"device": value, **({"nvme_path": str(folder)} if value == "nvme" else {})}
        for key, value in HOMES[home].items()
    }
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zeroxide": {"device": str(device), **own},
        **({} if dtype == "fp32" else {dtype: {"enabled": True}}),
    }


def moved(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def plain_gradients(family: str, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    # Weights lie contiguous in an engine, and convolutions sum in another order for other layouts.
    model = build(family).to(device, memory_format=torch.contiguous_format).train()
    torch.manual_seed(5)
    loss = loss_of(model(**moved(batches(family, 1)[0], device)))
    loss.backward()
    return loss.item(), {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_plain_torchs(family, home, device, tmp_path, monkeypatch):
    if family.startswith("hf-"):
        pytest.importorskip("transformers")
    monkeypatch.setattr("zeroxide.plan.discover.DEFAULT_UNIT_BYTES", 8)
    wanted = plain_gradients(family, device)
    again = plain_gradients(family, device)
    if wanted[0] != again[0] or any(not torch.equal(grad, again[1][name]) for name, grad in wanted[1].items()):
        pytest.skip("torch does not repeat this model on this device")
    engine, *_ = zeroxide.initialize(model=build(family).train(), config=config_of(home, tmp_path, device))
    try:
        torch.manual_seed(5)
        loss = loss_of(engine(**moved(batches(family, 1)[0], device)))
        engine.backward(loss)
        assert loss.item() == wanted[0]
        for name, param in engine.module.named_parameters():
            found, grad = zeroxide.safe_get_full_grad(param), wanted[1].get(name)
            assert (found is None) == (grad is None), name
            assert found is None or torch.equal(found, grad.float().cpu()), name
    finally:
        engine.destroy()


def trained(
    home: str, dtype: str, device: torch.device, folder: Path, steps: int = 6, **own
) -> tuple[list[float], dict]:
    config = config_of(home, folder, device, dtype, **own)
    engine, *_ = zeroxide.initialize(model=build("gpt").train(), config=config)
    assert bool(engine.plan().units_on_device) == (home == "resident")
    losses = []
    for batch in batches("gpt", steps):
        loss = loss_of(engine(**moved(batch, device)))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = {name: value.cpu() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return losses, weights


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_home_of_the_state_changes_no_bit(dtype, device, tmp_path):
    losses, weights = trained("resident", dtype, device, tmp_path)
    for home in list(HOMES)[1:]:
        found = trained(home, dtype, device, tmp_path)
        assert found[0] == losses, home
        assert all(torch.equal(value, weights[name]) for name, value in found[1].items()), home


@pytest.mark.parametrize("format", ["split-bf16", "compact"])
def test_formats_that_round_have_the_cpus_bits(format, device, tmp_path):
    """Kernels round by the random bits that the CPU rounds by."""
    losses, weights = trained("resident", "bf16", device, tmp_path, format=format)
    found = trained("resident-disk", "bf16", device, tmp_path, format=format)
    assert found[0] == losses
    assert all(torch.equal(value, weights[name]) for name, value in found[1].items())


def test_a_side_stream_changes_no_bit(device, tmp_path):
    """Catches: copies that are ordered with the default stream alone."""
    expected = trained("transient", "bf16", device, tmp_path)
    stream = torch.Stream(device)
    with stream:
        found = trained("transient", "bf16", device, tmp_path)
    assert found[0] == expected[0]


def test_bytes_and_memory(device, tmp_path):
    """2 bytes a parameter down, 2 up for each use, and room for a few units where weights come and go."""
    width, layers = 1024, 12
    parameters, unit = layers * width * width, 2 * width * width

    def one(home: str) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        config = config_of(home, tmp_path, device, "bf16", unit_bytes=unit)
        engine, *_ = zeroxide.initialize(model=model, config=config)
        x = torch.ones(8, width, device=device, dtype=torch.bfloat16)
        for _ in range(2):
            before = engine.device_traffic()
            torch.accelerator.reset_peak_memory_stats(device)
            engine.backward(engine(x).float().square().mean())
            peak = torch.accelerator.max_memory_allocated(device)
            engine.step()
        after = engine.device_traffic()
        assert after["down"] - before["down"] == 2 * parameters
        assert after["up"] - before["up"] == 2 * parameters * (1 if home == "resident" else 2)
        engine.destroy()
        return peak

    resident, transient = one("resident"), one("transient")
    assert transient < resident - (layers - 8) * unit
