"""Train GPT-2 for a few steps with zeroxide and report times, memory and disk bytes.

One argument: a JSON object

    {"model": "124m", "rows": 1, "columns": 128, "steps": 6, "offload": "nvme" | "cpu" | "none" | null,
     "directory": where the blocks go, "host_memory": "1GiB" or null, "threads": 2}

Without "offload", "config" says where everything is at home.

The model is built on the meta device and its weights are made a unit at a time, as one does who minds memory.
With state on disk a step goes on under the next forward. "settings": "drained" waits for its end within the step, so
that its whole time is seen there. With "no_processes": true, starting any other program (a compiler, say) ends the
run with an error.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

STARTS_A_PROCESS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile")


def refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: an error where Python would start another program."""
    if event in STARTS_A_PROCESS:
        raise RuntimeError(f"{event} during a run that may start no other program: {arguments}")


class SeededWeights:
    """The initial values of gpt2.py for `layers` layers, a unit at a time."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def fill(self, tensors: dict[str, Any], modules: dict[str, Any]) -> None:
        import gpt2
        import torch

        for name, tensor in tensors.items():
            gpt2.fill_parameter(name, tensor, self.layers)
        for module in modules.values():
            for buffer in module.buffers(recurse=False):
                if buffer.dtype is torch.bool:
                    buffer.copy_(torch.ones_like(buffer).tril())


def main() -> None:
    spec = json.loads(sys.argv[1])
    started = time.perf_counter()

    import process
    import torch

    if spec.get("no_processes"):
        sys.addaudithook(refuse_processes)
    import zeroxide

    imported = time.perf_counter()
    import gpt2
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(spec["threads"])
    config = gpt2.model_config(spec["model"])
    before = process.memory()
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    numel = sum(parameter.numel() for parameter in model.parameters())

    offload = f"nvme:{spec['directory']}" if spec["offload"] == "nvme" else spec["offload"]
    model.train()
    engine, *_ = zeroxide.initialize(
        model=model,
        weights=SeededWeights(config.n_layer),
        offload=offload,
        host_memory=spec.get("host_memory"),
        dtype="bf16",
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        gradient_clipping=1.0,
        gradient_accumulation_steps=1,
        config=spec.get("config"),
    )
    ready = time.perf_counter()
    built = process.memory()

    def update() -> None:
        engine.step()
        if spec.get("settings") == "drained":
            # Nothing that users call does this: the update is finished here so that none of it is counted as forward.
            engine.finish_step()

    steps = []
    process.reset_peak()
    for step in range(spec["steps"]):
        place = step * engine.world_size + engine.global_rank
        batch = gpt2.batch(spec["model"], spec["rows"], spec["columns"], place)
        engine.ranks.barrier()
        steps.append(process.timed_step(lambda batch=batch: engine(**batch).loss, engine.backward, update))
    memory = process.memory_of_run(before, built)
    own = engine.memory()
    io = engine.io()
    plan = engine.plan().describe()
    sent = engine.exchanged_bytes()
    engine.destroy()
    process.emit(
        {
            "engine": f"zeroxide {zeroxide.__version__}",
            "torch": torch.__version__,
            "parameters": numel,
            "steps": steps,
            "import_seconds": imported - started,
            "setup_seconds": ready - imported,
            "memory": memory,
            "buckets": own,
            "io": io,
            "sent_bytes": sent,
            "plan": plan,
        }
    )


if __name__ == "__main__":
    main()
