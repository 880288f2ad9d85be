"""What every rank of the tests of edited weights runs: all ranks change bf16 weights alike after each step."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

import zeroxide

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import build

torch.set_num_threads(1)
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def train(stage: int, format: str, optimizer: str) -> list[torch.Tensor]:
    """Live and exact weights after three steps with an edit after each; every rank sees all of them."""
    torch.manual_seed(0)
    model = build("gpt")
    folder = tempfile.mkdtemp(dir=os.environ["JOB_FOLDER"])
    section = {"stage": stage}
    if optimizer == "nvme":
        section["offload_optimizer"] = {"device": "nvme", "nvme_path": folder}
    config = {
        "zero_optimization": section,
        "zeroxide": {"threads": 1, "transport": "collective", "format": format},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "steps_per_print": None,
    }
    engine = zeroxide.initialize(model=model, config=config)[0]
    for step in range(3):
        generator = torch.Generator().manual_seed(step * WORLD + RANK)
        engine.backward(engine(torch.randint(0, 61, (2, 12), generator=generator)))
        engine.step()
        with torch.no_grad():
            model.h[0].up.weight.clamp_(min=0)
        model.h[1].down.weight.data[::2] = 0
        # Of the whole weight: a rank that had old values of another's shard would scale by another number.
        model.wte.weight.data.div_(model.wte.weight.data.float().norm())
    found = [param.detach().clone() for param in model.parameters()]
    exact = [zeroxide.safe_get_full_fp32_param(param) for param in model.parameters()]
    assert model.h[0].up.weight.min() == 0
    assert not model.h[1].down.weight[::2].any()
    for live, value in zip(found, exact, strict=True):
        assert value.isfinite().all()
        bits = (value.view(torch.int32) + 0x8000) >> 16
        assert torch.equal(bits.to(torch.int16), live.view(torch.int16))
    engine.destroy()
    return found + exact


def main() -> None:
    zeroxide.init_distributed()
    first: list[torch.Tensor] | None = None
    for stage, format, optimizer in [
        (0, "split", "none"),
        (1, "split", "none"),
        (2, "fp32", "none"),
        (2, "split", "nvme"),
        (1, "fp32", "nvme"),
        (0, "fp32", "none"),
    ]:
        values = train(stage, format, optimizer)
        first = first or values
        same = all(torch.equal(a, b) for a, b in zip(values, first, strict=True))
        print("same" if same else f"stage {stage} {format} {optimizer} differs", flush=True)


main()
