"""For how long saving a checkpoint in the background stops training, as a share of the time that writing takes.

    python benches/checkpoint.py --model 355m --offload cpu

Every run is a process of its own: GPT-2, batch 1 x 128, bf16, AdamW. It saves `--saves` times and trains on while each
save is under way. `stopped` is what the call, the update that waits for the capture, and the end of the save took of
the training thread (`Engine.checkpoint_stats`); `steps` are those that ran meanwhile, beside `plain` ones before.
"""

from __future__ import annotations

import shutil
import statistics
from typing import Any

import side_by_side as bench
from workers.gpt2 import SIZES


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.set_defaults(rounds=2)
    parser.add_argument("--model", choices=SIZES, default="355m")
    parser.add_argument("--offload", choices=("none", "cpu", "nvme"), default="cpu")
    parser.add_argument("--durable", action="store_true", help="with nvme: saves read a commit, and no step waits")
    parser.add_argument("--memory", help="zeroxide.checkpoint_memory, as in 512MiB (default: the engine's)")
    parser.add_argument("--saves", type=int, default=2, help="saves a run")
    options = parser.parse_args()

    bench.emit("machine", bench.machine(options.directory))
    saves: list[dict[str, Any]] = []
    plain: list[float] = []
    directory = options.directory / "checkpoint"
    for number in range(options.rounds):
        bench.note(f"{options.model}, round {number + 1} of {options.rounds}")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        spec = {
            "model": options.model,
            "offload": options.offload,
            "memory": options.memory,
            "saves": options.saves,
            "durable": options.durable,
            "directory": str(directory),
            "threads": options.threads,
        }
        try:
            result = bench.run_worker(
                bench.zeroxide_side(), "checkpointing.py", spec, threads=options.threads, prefix=options.prefix
            )
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        saves += result["saves"]
        plain += result["plain_steps"]
    steps = [seconds for save in saves for seconds in save["steps"]]
    share = statistics.median(save["stopped"] / save["writing"] for save in saves)
    bench.emit(
        "checkpoint",
        {
            "model": options.model,
            "offload": options.offload,
            "bytes": saves[0]["bytes"],
            "writing_seconds": bench.summary(save["writing"] for save in saves),
            "call_seconds": bench.summary((save["call"] for save in saves), 4),
            "stopped_seconds": bench.summary((save["stopped"] for save in saves), 4),
            "snapshot_bytes": max(save["memory_peak"] for save in saves),
            "plain_step_seconds": bench.summary(plain),
            "step_seconds_meanwhile": bench.summary(steps) if steps else None,
        },
    )
    bench.emit(
        "checkpoint",
        bench.goal(f"training stopped, share of the write time, {options.model}", share, 0.05, at_most=True),
    )


if __name__ == "__main__":
    main()
