"""Train GPT-2 with weights on disk, a step a round, in one order of micro-batches: ../accumulation_order.py.

One argument: a JSON object

    {"model": "124m", "order": "batches" | "layers", "micro_batches": 8, "rows": 1, "columns": 128,
     "state": "nvme" | "cpu", "directory": where the blocks go, "threads": 2}

With state in host memory it is kept in a master of its own ("fp32"), so that a step reads nothing but weights.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import gpt2
import process
import torch
from rounds import serve
from transformers import GPT2LMHeadModel
from zeroxide_step import SeededWeights

import zeroxide


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    size = gpt2.model_config(spec["model"])
    with torch.device("meta"):
        model = GPT2LMHeadModel(size)
    model.train()
    own: dict[str, Any] = {"accumulation_order": spec["order"]}
    if spec["state"] == "cpu":
        own["format"] = "fp32"
    engine, *_ = zeroxide.initialize(
        model=model,
        weights=SeededWeights(size.n_layer),
        offload_param=f"nvme:{spec['directory']}",
        offload_optimizer=f"nvme:{spec['directory']}" if spec["state"] == "nvme" else "cpu",
        dtype="bf16",
        lr=1e-4,
        gradient_clipping=1.0,
        gradient_accumulation_steps=spec["micro_batches"],
        config={"zeroxide": own},
    )
    parameters = sum(numel for numel in (param.ds_numel for param in model.parameters()))
    feed = (gpt2.batch(spec["model"], spec["rows"], spec["columns"], number) for number in itertools.count())

    def step() -> dict[str, object]:
        before, begun, seconds, worked = engine.io(), time.perf_counter(), engine.times(), time.process_time()
        loss = engine.train_batch(feed)
        took, worked = time.perf_counter() - begun, time.process_time() - worked
        after, then = engine.io(), engine.times()
        moved = {name: (after[name] - before[name]) / parameters for name in ("read_bytes", "write_bytes")}
        phases = {name: then[name] - seconds[name] for name in then}
        phases["processor"] = worked
        return {"seconds": took, "loss": float(loss), **moved, **phases, "peak": process.memory()["peak"]}

    serve({"parameters": parameters}, step)
    engine.destroy()


if __name__ == "__main__":
    main()
