"""One CPU optimizer step over and over, timed a round at a time. Runs under either side's interpreter.

One argument: a JSON object

    {"kind": "torch-fp32" | "deepspeed-fp32" | "deepspeed-bf16" | "zeroxide-fp32" | "zeroxide-split" | "zeroxide-bf16",
     "parameters": 100000000, "tensors": 8, "steps": steps a round, "threads": 2}

| kind | parameters, gradients | state | bytes a parameter and step |
|---|---|---|---|
| torch-fp32, deepspeed-fp32, zeroxide-fp32 | fp32, fp32 | fp32 moments | 28 |
| deepspeed-bf16 | bf16, bf16 | fp32 moments, no master copy: the update itself is rounded to bf16 | 22 |
| zeroxide-split | bf16, bf16 | fp32 moments, low half of the master weight | 26 |
| zeroxide-bf16 | bf16, bf16 | fp32 moments and fp32 master weight | 28 |
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import rounds
import torch

BYTES_PER_PARAMETER = {
    "torch-fp32": 28,
    "deepspeed-fp32": 28,
    "deepspeed-bf16": 22,
    "zeroxide-fp32": 28,
    "zeroxide-split": 26,
    "zeroxide-bf16": 28,
}

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def make_optimizer(kind: str, parameters: list[torch.nn.Parameter], threads: int) -> torch.optim.Optimizer:
    """The optimizer of `kind` over `parameters`."""
    if kind == "torch-fp32":
        return torch.optim.AdamW(parameters, fused=True, **HYPERPARAMETERS)
    if kind.startswith("deepspeed-"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, fp32_optimizer_states=True, **HYPERPARAMETERS)
    import zeroxide

    state = "split" if kind == "zeroxide-split" else "fp32"
    return zeroxide.AdamW(parameters, offload="cpu", format=state, threads=threads, **HYPERPARAMETERS)


def main() -> None:
    spec = json.loads(sys.argv[1])
    kind = spec["kind"]
    torch.set_num_threads(spec["threads"])
    dtype = torch.float32 if kind.endswith("fp32") else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    length = spec["parameters"] // spec["tensors"]
    parameters = []
    for _ in range(spec["tensors"]):
        # Through torch's own allocator, so that huge pages asked of it apply.
        weight = torch.empty(length, dtype=dtype).normal_(0.0, 0.02, generator=generator)
        parameter = torch.nn.Parameter(weight)
        parameter.grad = torch.empty(length, dtype=dtype).normal_(0.0, 1e-3, generator=generator)
        parameters.append(parameter)
    optimizer = make_optimizer(kind, parameters, spec["threads"])
    # The first step makes the state, the second touches it as every later one does.
    optimizer.step()
    optimizer.step()

    def measure() -> dict[str, object]:
        wall, cpu = [], []
        for _ in range(spec["steps"]):
            times = os.times()
            start = time.perf_counter()
            optimizer.step()
            wall.append(time.perf_counter() - start)
            after = os.times()
            cpu.append(after.user + after.system - times.user - times.system)
        return {"seconds": wall, "cpu_seconds": cpu}

    rounds.serve(
        {
            "kind": kind,
            "parameters": length * spec["tensors"],
            "bytes_per_parameter": BYTES_PER_PARAMETER[kind],
            "torch": torch.__version__,
        },
        measure,
    )


if __name__ == "__main__":
    main()
