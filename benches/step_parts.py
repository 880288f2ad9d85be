"""Where the time and the memory of a step go, with GPT-2 124 M: phases, disk, and what the process holds.

    python benches/step_parts.py --offload nvme

Batch 1 x 128, bf16, clipping at 1.0, one process, two threads; medians over the steps after the third. No comparison:
`train_step.py` and `hf_trainer.py` have those.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import hf_trainer
import side_by_side as bench

FIRST_MEASURED_STEP = 3


def snapshot(engine: Any) -> dict[str, float]:
    """Counts since the start."""
    counted = {name: value for name, value in engine.io().items() if isinstance(value, int | float)}
    return {"wall_seconds": time.perf_counter(), **counted, **engine.times()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offload", default="nvme", choices=("nvme", "cpu"), help="home of everything (default nvme)")
    parser.add_argument("--format", help="of the optimizer state (default: zeroxide's)")
    parser.add_argument(
        "--gradients", default="auto", choices=("auto", "host", "disk"), help="where they wait for the step"
    )
    parser.add_argument("--model", default="124m", help="size (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps (default %(default)s)")
    bench.scratch_argument(parser)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(bench.WORKERS))
    import gpt2
    import torch
    from transformers import GPT2LMHeadModel

    import zeroxide
    from zeroxide import _core

    weights = hf_trainer.saved_weights(bench.zeroxide_side(), options.model, Path(options.directory))
    torch.set_num_threads(2)
    imported = _core.resident()["anon"]
    model = GPT2LMHeadModel.from_pretrained(weights, dtype=torch.float32)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    home = f"nvme:{options.directory}" if options.offload == "nvme" else options.offload
    own = {"zeroxide": {"format": options.format, "gradients": options.gradients}}
    engine, *_ = zeroxide.initialize(
        model=model, lr=1e-4, dtype="bf16", gradient_clipping=1.0, offload=home, config=own
    )
    made = engine.memory()["process"]["peak"]
    counts = []
    for step in range(options.steps + 1):
        counts.append(snapshot(engine))
        engine.backward(engine(**gpt2.batch(options.model, 1, 128, step)).loss)
        engine.step()
    counts = counts[FIRST_MEASURED_STEP:]
    parts = {name: statistics.median(b[name] - a[name] for a, b in itertools.pairwise(counts)) for name in counts[0]}
    parts["disk_bytes_a_parameter"] = (parts.get("read_bytes", 0) + parts.get("write_bytes", 0)) / parameters
    memory = engine.memory()
    buckets = {name: each["peak"] for name, each in memory.items() if isinstance(each, dict) and name != "process"}
    bytes_held = {"imports": imported, "made_peak": made, "peak": memory["process"]["peak"], **buckets}
    setting = {"offload": options.offload, "format": options.format, "gradients": options.gradients}
    bench.emit("step_parts", bench.machine(options.directory))
    bench.emit("step_parts", {**setting, "a_step": {k: round(v, 3) for k, v in parts.items()}})
    bench.emit("step_parts", {**setting, "mib": {k: v >> 20 for k, v in bytes_held.items()}})
    engine.destroy()


if __name__ == "__main__":
    main()
