"""Forward and backward of GPT-2 in bf16 with PyTorch alone, and no update: what no engine's step can do without.

One argument: a JSON object

    {"model": "124m", "rows": 1, "columns": 128, "steps": 6, "threads": 2}

Weights stay in memory, gradients are dropped after each step.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    spec = json.loads(sys.argv[1])
    started = time.perf_counter()

    import gpt2
    import process
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(spec["threads"])
    before, imported = process.memory(), time.perf_counter()
    config = gpt2.model_config(spec["model"])
    model = GPT2LMHeadModel(config).train()
    for name, parameter in model.named_parameters():
        gpt2.fill_parameter(name, parameter.data, config.n_layer)
    model.bfloat16()
    built, ready = process.memory(), time.perf_counter()
    steps = []
    process.reset_peak()
    for step in range(spec["steps"]):
        batch = gpt2.batch(spec["model"], spec["rows"], spec["columns"], step)
        steps.append(
            process.timed_step(lambda batch=batch: model(**batch).loss, lambda loss: loss.backward(), lambda: None)
        )
        model.zero_grad()
    process.emit(
        {
            "engine": "torch",
            "torch": torch.__version__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": steps,
            "import_seconds": imported - started,
            "setup_seconds": ready - imported,
            "memory": process.memory_of_run(before, built),
        }
    )


if __name__ == "__main__":
    main()
