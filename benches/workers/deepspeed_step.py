"""Train GPT-2 for a few steps with DeepSpeed ZeRO-3 and report times, memory and disk bytes.

Runs under the peers' interpreter (see ../peers/setup.py). One argument: a JSON object

    {"model": "124m", "rows": 1, "columns": 128, "steps": 6, "offload": "nvme" | "cpu" | "none",
     "directory": where the swap files go, "settings": "lean" | "disk" | "defaults", "threads": 2}

"zero_options", "optimizer_options" and "parameter_options" override single settings, to try whether they help.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from typing import Any

MIB = 1 << 20


def configuration(spec: dict[str, Any], largest: int) -> dict[str, Any]:
    """DeepSpeed's JSON configuration; `largest` is the number of elements of the largest parameter.

    "lean" is the least memory at no cost in speed, found by trying: small sub-groups and buckets, one parameter buffer
    just large enough for the largest parameter, no locked memory, and an I/O queue at the disk's best block size.
    Parameters "on NVMe" then stay in host memory as long as they are fewer than `max_in_cpu` (1e9), as DeepSpeed has
    it by default. "disk" is the same with them really on disk, for which it needs its five buffers. "defaults" sets
    nothing that need not be set. `pipeline_read` and `pipeline_write` stay off: with them DeepSpeed 0.19.8 stops at an
    assertion in the first step.
    """
    lean = spec["settings"] != "defaults"
    zero: dict[str, Any] = {"stage": 3}
    if lean:
        zero |= {
            "sub_group_size": 10_000_000,
            "stage3_max_live_parameters": 50_000_000,
            "stage3_max_reuse_distance": 50_000_000,
            "stage3_prefetch_bucket_size": 5_000_000,
            "reduce_bucket_size": 5_000_000,
            "stage3_param_persistence_threshold": 10_000,
        }
    if spec["offload"] != "none":
        optimizer: dict[str, Any] = {"device": spec["offload"]}
        parameters: dict[str, Any] = {"device": spec["offload"]}
        if spec["offload"] == "nvme":
            optimizer["nvme_path"] = parameters["nvme_path"] = spec["directory"]
            if lean:
                parameters |= {"buffer_size": max(largest + 1024, 10_000_000), "buffer_count": 1}
            if spec["settings"] == "disk":
                parameters |= {"buffer_count": 5, "max_in_cpu": 0}
        if lean:
            optimizer["pin_memory"] = parameters["pin_memory"] = False
        zero |= {
            "offload_optimizer": optimizer | spec.get("optimizer_options", {}),
            "offload_param": parameters | spec.get("parameter_options", {}),
        }
    zero |= spec.get("zero_options", {})
    config = {
        "train_micro_batch_size_per_gpu": spec["rows"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "zero_optimization": zero,
        "steps_per_print": 1_000_000,
    }
    if lean:
        config["aio"] = {"block_size": MIB, "queue_depth": 32, "single_submit": False, "overlap_events": True}
    return config


def one_process_world() -> None:
    """The variables a launcher would set, for a world of one, unless one has set them."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    one_process_world()
    started = time.perf_counter()

    import deepspeed
    import process
    import torch

    imported = time.perf_counter()
    import gpt2
    from transformers import GPT2LMHeadModel

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(spec["threads"])
    config = gpt2.model_config(spec["model"])
    settings = configuration(spec, largest=config.vocab_size * config.n_embd)

    before = process.memory()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # Each parameter is partitioned (and swapped out) as soon as its module is built.
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
        model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            value = torch.empty(parameter.shape)
            gpt2.fill_parameter(name, value, config.n_layer)
            parameter.data.copy_(value)
            del value
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    model.train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    ready = time.perf_counter()
    built = process.memory()

    steps = []
    process.reset_peak()
    for step in range(spec["steps"]):
        place = step * engine.world_size + engine.global_rank
        batch = gpt2.batch(spec["model"], spec["rows"], spec["columns"], place)
        if engine.world_size > 1:
            deepspeed.comm.barrier()
        steps.append(process.timed_step(lambda batch=batch: engine(**batch).loss, engine.backward, engine.step))
    memory = process.memory_of_run(before, built)
    process.emit(
        {
            "engine": f"deepspeed {deepspeed.__version__}",
            "torch": torch.__version__,
            "parameters": numel,
            "steps": steps,
            "import_seconds": imported - started,
            "setup_seconds": ready - imported,
            "memory": memory,
        }
    )


if __name__ == "__main__":
    main()
