"""Train GPT-2 for a few steps with torch's FSDP2 on one of several ranks and report times and memory.

Runs under the peers' interpreter, once for each rank, with torchrun's variables. One argument: a JSON object

    {"model": "124m", "rows": 1, "columns": 128, "steps": 6, "threads": 1}

bf16 weights in forward and backward, fp32 reduction, fused AdamW over fp32 shards; built on the meta device and filled
a parameter at a time, so that no rank ever holds the whole model in fp32.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    spec = json.loads(sys.argv[1])
    started = time.perf_counter()

    import process
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    imported = time.perf_counter()
    import gpt2
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(spec["threads"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = gpt2.model_config(spec["model"])
    before = process.memory()
    dist.init_process_group("gloo")
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    numel = sum(parameter.numel() for parameter in model.parameters())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.empty(parameter.shape)
            gpt2.fill_parameter(name, value, config.n_layer)
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
            del value
        for buffer in model.buffers():
            if buffer.dtype is torch.bool:
                buffer.copy_(torch.ones_like(buffer).tril())
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True
    )
    ready = time.perf_counter()
    built = process.memory()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    steps = []
    process.reset_peak()
    for step in range(spec["steps"]):
        batch = gpt2.batch(spec["model"], spec["rows"], spec["columns"], step * world + rank)
        dist.barrier()
        steps.append(process.timed_step(lambda batch=batch: model(**batch).loss, lambda loss: loss.backward(), update))
    memory = process.memory_of_run(before, built)
    process.emit(
        {
            "engine": "fsdp2",
            "torch": torch.__version__,
            "parameters": numel,
            "steps": steps,
            "import_seconds": imported - started,
            "setup_seconds": ready - imported,
            "memory": memory,
        }
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
