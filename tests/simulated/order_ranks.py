"""Two ranks, each with a simulated device, make whole steps again and again: each wait of rank 0 that orders something
is left out in turn, with those that would stand for it, and must be missed.

Arguments: a mode of `MODES`, and the transport.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from simulated import device, engines

device.load()

import torch.distributed as dist
from torch import nn

import zeroxide

CPU = {"offload_optimizer": {"device": "cpu"}}
MODES = {
    "resident": {"stage": 2, **CPU},
    "transient": {"stage": 3, **CPU},
    "transient-home": {"stage": 3, "offload_param": {"device": "cpu"}, **CPU},
    "expanded": {"stage": 3, "offload_param": {"device": "cpu"}, **CPU, "zero_quantized_weights": True},
}
mode, transport = sys.argv[1:]
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
dist.init_process_group("gloo")
sim = torch.sim


def evaluate(engine: zeroxide.Engine, x: torch.Tensor) -> None:
    with torch.no_grad():
        engine(x)


def steps(forgotten: list[int]) -> tuple[list, bool]:
    """Rank 0's waits in the second step, and whether it has seen a race."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": MODES[mode],
        "zeroxide": {"device": "sim", "threads": 1, "transport": transport},
    }
    engine = zeroxide.initialize(model=model, config=config)[0]
    x = torch.full((4, 8), 0.5 + rank, device=engine.device, dtype=torch.bfloat16, requires_grad=True)
    for number in range(2):
        if number == 1:
            sim.reset()
            for each in forgotten if rank == 0 else ():
                sim.forget_wait(each)
        engine.backward(engine(x).float().square().mean())
        evaluate(engine, x)
        engine.step()
    evaluate(engine, x)
    waits = sim.wait_list()
    evaluate(engine, x)
    engine.parts.context.before_change()
    engine.destroy()
    assert mode != "expanded" or engines.launched()
    raced = bool(sim.races())
    sim.reset()
    return waits, raced


def of_rank_0(value: object) -> object:
    found = [value]
    dist.broadcast_object_list(found, 0)
    return found[0]


sim.set_delay(0, 50, seed=4 + rank)
with engines.followed(kernels=mode == "expanded"):
    waits, raced = steps([])
    assert not raced
    texts = of_rank_0([(each.text, each.needed) for each in waits])
    missed = []
    for number, (text, needed) in enumerate(texts):
        forgotten: list[int] = []
        found = not needed
        for later in range(number, len(texts)):
            if found:
                break
            if texts[later][0] == text:
                forgotten.append(later)
                found = of_rank_0(steps(forgotten)[1])
        if not found:
            missed.append((number, text))
print(len([each for each in texts if each[1]]), missed, flush=True)
assert missed == []
dist.destroy_process_group()
