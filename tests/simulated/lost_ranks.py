"""Two ranks, each with a simulated device, of which rank 1 loses its own in the middle of its second step."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from simulated import device, engines

device.load()

from torch import nn

import zeroxide

torch.set_num_threads(1)
torch.manual_seed(0)
config = {
    "optimizer": {"type": "AdamW"},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "zeroxide": {"device": "sim", "threads": 1, "transport": sys.argv[1]},
}
with engines.followed():
    engine = zeroxide.initialize(model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config=config)[0]
    for step in range(20):
        if step == 1 and os.environ["RANK"] == "1":
            torch.sim.lose(after=int(sys.argv[2]), device=engine.device)
        engine.backward(engine(torch.ones(2, 8, device=engine.device)).square().mean())
        engine.step()
