"""How much of a step zeroxide's hooks spend in Python.

    python benches/hook_time.py --model 124m
    python benches/hook_time.py --world 1 --threads 2

Two ranks of one thread, weights and state in host memory, or with --offload nvme on disk. Every entry that autograd or
a module calls (before and after forward, before backward, a gradient that arrived, the ends of passes) is timed from
its first line to its last; what it spends inside the Rust core, which holds no Python lock, is timed as well and taken
off. What takes a gradient is Rust and times itself; the other timers count as hooks, so the share printed is an upper
bound. The steps are timed without them, in turns; both are those of the rank whose share is largest.
"""

from __future__ import annotations

import shutil
import statistics

import side_by_side as bench


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.set_defaults(threads=1)
    parser.add_argument("--model", choices=("tiny", "124m", "355m"), default="124m")
    parser.add_argument("--offload", choices=("none", "nvme"), default="none")
    parser.add_argument("--world", type=int, default=2, help="ranks (default %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="measured steps, every other one with timers")
    options = parser.parse_args()

    directory = options.directory / "hook-time"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    spec = {
        "model": options.model,
        "steps": options.steps,
        "offload": options.offload,
        "directory": str(directory),
        "threads": options.threads,
    }
    try:
        ranks = bench.run_ranks(
            bench.zeroxide_side(), "hooks.py", spec, world=options.world, threads=options.threads, prefix=options.prefix
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    shares = [statistics.median(one["hook_seconds"]) / statistics.median(one["step_seconds"]) for one in ranks]
    share = max(shares)
    worst = ranks[shares.index(share)]
    bench.emit("machine", bench.machine())
    bench.emit(
        "hook_time",
        {
            "model": options.model,
            "offload": options.offload,
            "ranks": options.world,
            "threads": options.threads,
            "hooks_a_step": worst["hooks_a_step"],
            "step_seconds": bench.summary(worst["step_seconds"]),
            "hook_seconds": bench.summary(worst["hook_seconds"], 5),
        },
    )
    bench.emit(
        "hook_time", bench.goal(f"Python time in hooks, share of a step, {options.model}", share, 0.01, at_most=True)
    )


if __name__ == "__main__":
    main()
