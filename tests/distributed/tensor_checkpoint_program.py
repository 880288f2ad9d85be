"""Saves and loads over tensor-parallel ranks: `save DIR FAMILY` and then `load DIR FAMILY TP STAGE ...`, see `main`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tensor_models import ADAM, batch, build

import zeroxide
from zeroxide.engine.engine import Engine
from zeroxide.parallel.tensor import shard_of

STATES = ("exp_avg", "exp_avg_sq")


def initialize(family: str, tp: int, stage: int, *, shift: float = 0.0, background: bool = False) -> Engine:
    model = build(family)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(shift)
    config = {
        "optimizer": {"type": "AdamW", "params": ADAM},
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": tp},
        "zeroxide": {"threads": 1, "checkpoint_background": background},
        "steps_per_print": None,
    }
    return zeroxide.initialize(model=model, config=config)[0]


def step(engine: Engine, number: int, tp: int) -> float:
    replicas = dist.get_world_size() // tp
    loss = engine(**batch(number * replicas + dist.get_rank() // tp)).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def state(engine: Engine) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        found[f"{name} weights"] = zeroxide.safe_get_full_fp32_param(param)
        for part in STATES:
            found[f"{name} {part}"] = zeroxide.safe_get_full_optimizer_state(param, part)
    return found


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, each in got.items():
        assert torch.equal(each, expected[name]), name


def save(folder: Path, family: str) -> None:
    """Two steps, a checkpoint, exports, one step more. Leaves what all ranks saw with torch.save, on rank 0."""
    tp = 2
    engine = initialize(family, tp, 3, background=True)
    for number in range(2):
        step(engine, number, tp)
    engine.save_checkpoint(folder, tag="cut")
    engine.save_16bit_model(folder / "model")
    found = {"state": state(engine), "own": engine.module_state_dict(), "dict": engine.module.state_dict()}
    reference = build(family).state_dict()
    assert list(found["dict"]) == list(reference)
    assert all(each.shape == reference[name].shape for name, each in found["dict"].items())
    assert bool(found["own"]) == (dist.get_rank() == 0)
    found["loss"] = step(engine, 2, tp)
    engine.destroy()
    if dist.get_rank() == 0:
        same(found["own"], found["dict"])
        torch.save(found, folder / "found.pt")


def load(folder: Path, family: str, ways: list[str]) -> None:
    """Loads in each way, "TP-STAGE", has the same state and goes on; saves it again from there."""
    found = torch.load(folder / "found.pt")
    for way in ways:
        tp, stage = map(int, way.split("-"))
        engine = initialize(family, tp, stage, shift=0.5)
        engine.load_checkpoint(folder, tag="cut")
        assert engine.global_steps == 2
        same(state(engine), found["state"])
        engine.save_checkpoint(folder, tag=way)
        replicas = dist.get_world_size() // tp
        loss = step(engine, 2, tp)
        if replicas == dist.get_world_size() // 2 and dist.get_rank() == 0:
            assert loss == found["loss"], way
        engine.destroy()
        dist.barrier()
    engine = initialize(family, 2, 1, shift=0.25)
    for way in ways:
        engine.load_checkpoint(folder, tag=way)
        same(state(engine), found["state"])
    edit(engine, found["own"])
    engine.destroy()


def edit(engine: Engine, own: dict[str, torch.Tensor]) -> None:
    """All ways in which scripts change weights: rank 0's count, and all ranks have them."""
    with torch.no_grad():
        zeros = {name: torch.zeros_like(each) for name, each in own.items()}
    engine.load_module_state_dict(zeros if dist.get_rank() == 0 else {})
    for name, param in engine.module.named_parameters():
        assert not zeroxide.safe_get_full_fp32_param(param).any(), name
    cut = next(param for param in engine.module.parameters() if shard_of(param) is not None)
    alike = next(param for param in engine.module.parameters() if shard_of(param) is None)
    for param in (cut, alike):
        shape = zeroxide.safe_get_full_fp32_param(param).shape
        zeroxide.safe_set_full_fp32_param(param, torch.full(shape, 1.0 + dist.get_rank()))
        assert (zeroxide.safe_get_full_fp32_param(param) == 1).all()
    with zeroxide.zero.GatheredParameters([alike], modifier_rank=0):
        alike.data.fill_(7.0 + dist.get_rank())
    assert (zeroxide.safe_get_full_fp32_param(alike) == 7).all()
    with zeroxide.zero.GatheredParameters([alike]):
        assert (alike == 7).all()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    act, folder, family, *ways = sys.argv[1:]
    if act == "save":
        save(Path(folder), family)
    else:
        load(Path(folder), family, ways)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
