"""A job whose ranks use different modules although weights are gathered by collectives. Argument: what differs."""

from __future__ import annotations

import sys

import torch
from families import build, micro_batch

import zeroxide

torch.set_num_threads(1)
config = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3},
    "zeroxide": {"transport": "collective", "threads": 1, "rank_timeout": 2},
    "steps_per_print": None,
}
engine, *_ = zeroxide.initialize(model=build("skips-blocks"), config=config)
what, _, evaluating = sys.argv[1].partition(", ")
run = {"one more": [[1, 0, 1, 0], [1, 1, 1, 0]], "others": [[1, 0, 1, 0], [0, 1, 0, 1]]}[what]
for step in range(5):
    batch = micro_batch("skips-blocks", step) | {"run": torch.tensor(run[engine.global_rank])}
    with torch.set_grad_enabled(not evaluating):
        loss = engine(**batch)
    if not evaluating:
        engine.backward(loss)
        engine.step()
    print("step", step, flush=True)
engine.destroy()
