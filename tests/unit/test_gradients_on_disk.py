"""Gradients that wait on disk for the step: the bits of those in host memory, and when the plan puts them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.config import load
from zeroxide.engine.engine import Engine
from zeroxide.errors import ConfigError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan, make_plan

WIDTH = 96
BLOCKS = 4


class Stack(nn.Module):
    """An embedding and a head that are one weight, and blocks between them, the first of which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 200), nn.Linear(200, WIDTH)) for _ in range(BLOCKS))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for block in (*self.blocks, self.blocks[0]):
            hidden = hidden + block(hidden).tanh()
        return hidden @ self.table.weight.t()


def engine_with(folder: Path, gradients: str, **own: Any) -> Engine:
    torch.manual_seed(0)
    disk = {"device": "nvme", "nvme_path": str(folder)}
    engine, *_ = zeroxide.initialize(
        model=Stack(),
        config={
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "gradient_clipping": 0.3,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 3, "offload_param": disk, "offload_optimizer": disk},
            "zeroxide": {"gradients": gradients, "tile_bytes": 4096, "threads": 2, **own},
            "steps_per_print": None,
        },
    )
    return engine


def trained(engine: Engine, steps: int) -> dict[str, Any]:
    """Losses, norms, a gradient after the first of two micro-batches and after both, and all weights and moments."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": []}
    seen = dict(engine.module.named_parameters())["blocks.3.0.weight"]
    for _ in range(2 * steps):
        tokens = torch.randint(0, 256, (4, 16), generator=generator)
        logits = engine(tokens)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.roll(1, 1).flatten())
        engine.backward(loss)
        found["grads"].append(zeroxide.safe_get_full_grad(seen))
        engine.step()
        found["losses"].append(loss.item())
        found["norms"].append(engine.get_global_grad_norm())
    for name, param in engine.module.named_parameters():
        found[name] = zeroxide.safe_get_full_fp32_param(param)
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name} {moment}"] = zeroxide.safe_get_full_optimizer_state(param, moment)
    return found


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_gradients_on_disk_train_the_same_bits(tmp_path: Path) -> None:
    """Catches: a further micro-batch that starts from zero, a norm of a part, a gradient that is read where memory has
    another unit's by now."""
    results = []
    for gradients in ("host", "disk"):
        engine = engine_with(tmp_path, gradients)
        assert engine.plan().gradients is Home(gradients)
        results.append(trained(engine, 3))
        engine.destroy()
    assert len(set(results[0]["losses"])) == 6, "training does something"
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert_same(value, results[1][name])


def test_zero_grad_forgets_what_is_on_disk(tmp_path: Path) -> None:
    """Catches: gradients on disk that survive `zero_grad`."""
    engine = engine_with(tmp_path, "disk")
    engine.backward(engine(torch.arange(32).view(2, 16)).float().square().mean())
    params = dict(engine.module.named_parameters())
    assert zeroxide.safe_get_full_grad(params["blocks.3.0.weight"]).abs().sum() > 0
    engine.zero_grad()
    found = zeroxide.safe_get_full_grad(params["blocks.3.0.weight"])
    assert found is None or not found.any()
    engine.destroy()


def test_the_plan_says_what_memory_and_disk_take(tmp_path: Path) -> None:
    """Catches: a plan whose buckets or files are not those of gradients on disk: 2 bytes a parameter more there."""
    plans = {}
    for gradients in ("host", "disk"):
        engine = engine_with(tmp_path, gradients)
        plans[gradients] = engine.plan()
        assert engine.memory()["gradients"]["peak"] == plans[gradients].buckets["gradients"]
        engine.destroy()
    host, disk = plans["host"], plans["disk"]
    padded = sum(trainable for trainable, _ in host.numbers.padded)
    assert host.buckets["gradients"] == 2 * padded
    assert disk.disk_bytes == host.disk_bytes + 2 * padded
    assert disk.buckets["gradients"] < host.buckets["gradients"]
    assert "on disk until the step" in "\n".join(disk.describe())


def plan_for(blocks: int, limit: int | None) -> Plan:
    """The plan for so many blocks of 64 Mi elements, of a process that takes 100 MiB without them."""
    with torch.device("meta"):
        model = nn.Sequential(nn.ModuleList(nn.Linear(8192, 8192, bias=False) for _ in range(blocks)))
    disk = {"device": "nvme", "nvme_path": "/"}
    config = load(
        {
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": 3, "offload_param": disk, "offload_optimizer": disk},
            "zeroxide": {"host_memory": limit},
        },
        world_size=1,
    )
    return make_plan(model, config, threads=1, resident=100 << 20)


def test_gradients_go_to_disk_where_they_are_many_or_do_not_fit() -> None:
    """Catches: memory that grows with the model, a budget refused that the disk would hold, and gradients on disk where
    memory is left. A block has 128 MiB of gradients; frames take two blocks, a fill one more beside the ring of 32 MiB.
    """
    mib = 1 << 20
    assert plan_for(2, None).gradients is Home.HOST
    assert plan_for(3, None).gradients is Home.DISK
    assert plan_for(16, None).buckets == {**plan_for(32, None).buckets}
    # Two units that are in memory at once gain nothing by it, however many gradients they have.
    tight = plan_for(2, None).resident_before + plan_for(2, None).expected_peaks()["total"]
    assert plan_for(2, tight).gradients is Home.HOST
    # All of 8 blocks: 1024 MiB. A quarter of the budget is left to activations before gradients take it.
    whole = 100 + 1024 + 256 + 32
    assert plan_for(8, whole * mib * 4 // 3 + mib).gradients is Home.HOST
    assert plan_for(8, whole * mib * 4 // 3 - mib).gradients is Home.DISK
    assert plan_for(8, 1024 * mib).gradients is Home.DISK


@pytest.mark.parametrize(
    ("zero", "why"),
    [({"stage": 3}, "needs the optimizer state on disk"), ({"stage": 1}, "needs the optimizer state on disk")],
)
def test_gradients_on_disk_are_refused_without_state_on_disk(zero: dict[str, Any], why: str) -> None:
    """Catches: an option that would have no effect and says nothing."""
    with pytest.raises(ConfigError, match=why):
        zeroxide.initialize(
            model=Stack(),
            config={
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
                "zero_optimization": zero,
                "zeroxide": {"gradients": "disk"},
            },
        )
