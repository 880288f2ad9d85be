"""Train GPT-2 with zeroxide while checkpoints are written in the background: ../checkpoint.py.

One argument: a JSON object

    {"model": "355m", "offload": "none" | "cpu" | "nvme", "memory": "512MiB" or null, "saves": 2,
     "durable": false, "directory": where checkpoints and blocks go, "threads": 2}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpt2
import process
import torch
from transformers import GPT2LMHeadModel

import zeroxide

WARM_UP = 2
PLAIN = 3


def main() -> None:
    spec = json.loads(sys.argv[1])
    directory = Path(spec["directory"])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    own: dict[str, Any] = {"checkpoint_background": True, "threads": spec["threads"]}
    if spec["memory"]:
        own["checkpoint_memory"] = spec["memory"]
    if spec["durable"]:
        # No commit falls into the steps that are measured but that of the save itself.
        own["durable_every"] = 1000
    engine, *_ = zeroxide.initialize(
        model=GPT2LMHeadModel(gpt2.model_config(spec["model"])),
        offload=f"nvme:{directory / 'blocks'}" if spec["offload"] == "nvme" else spec["offload"],
        dtype="bf16",
        lr=1e-4,
        gradient_clipping=1.0,
        config={"zeroxide": own, "steps_per_print": None},
    )

    def step(number: int) -> float:
        batch = gpt2.batch(spec["model"], 1, 128, number)
        start = time.perf_counter()
        engine.backward(engine(**batch).loss)
        engine.step()
        engine.finish_step()
        return time.perf_counter() - start

    plain = [step(number) for number in range(WARM_UP + PLAIN)][WARM_UP:]
    saves = []
    for number in range(spec["saves"]):
        before = engine.checkpoint_stats()
        began = time.perf_counter()
        engine.save_checkpoint(directory / "saved", f"save-{number}")
        call = time.perf_counter() - began
        steps = []
        while engine.checkpoint_stats()["under_way"]:
            steps.append(step(len(steps)))
        engine.wait_for_checkpoint()
        after = engine.checkpoint_stats()
        saves.append(
            {
                "call": call,
                "stopped": after["seconds_stopped"] - before["seconds_stopped"],
                "writing": after["seconds_writing"] - before["seconds_writing"],
                "bytes": after["bytes"] - before["bytes"],
                "memory_peak": after["memory_peak"],
                "steps": steps,
            }
        )
    engine.destroy()
    process.emit({"plain_steps": plain, "saves": saves})


if __name__ == "__main__":
    main()
