"""The training step over several ranks of one host, beside FSDP2 and DeepSpeed ZeRO-3: time, memory, bytes exchanged.

    python benches/data_parallel.py --rounds 3
    python benches/data_parallel.py --world 1 --world 2 --world 4 --engine zeroxide

Every rank is a process of its own with `--threads` threads: batch 1 x 128 a rank, bf16, clipping at 1.0, AdamW, the
same initial weights and batches for all engines. A round runs each contestant once. A step takes as long as its slowest
rank; memory is the largest rank's peak (VmHWM), pages that ranks share counted in each of them.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import side_by_side as bench

FIRST_MEASURED_STEP = 2
PHASES = ("forward", "backward", "step", "total")
ENGINES = ("fsdp", "deepspeed", "zeroxide", "zeroxide-collective")


@dataclass(frozen=True)
class Entry:
    """One contestant."""

    engine: str
    world: int
    allocator: str

    @property
    def name(self) -> str:
        """What results call it."""
        return f"{self.engine} x{self.world} {self.allocator}"


def run(entry: Entry, model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One job; the results of its ranks."""
    directory = options.directory / "data-parallel"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    ours = entry.engine.startswith("zeroxide")
    spec: dict[str, Any] = {
        "model": model,
        "rows": options.batch,
        "columns": options.sequence,
        "steps": options.steps,
        "threads": options.threads,
        "offload": "none",
        "directory": str(directory),
        "settings": "lean",
    }
    if ours:
        transport = "collective" if entry.engine == "zeroxide-collective" else "auto"
        spec["config"] = {
            "zero_optimization": {"stage": 3},
            "zeroxide": {"transport": transport, "threads": options.threads},
        }
    side = bench.zeroxide_side() if ours else bench.peers_side()
    worker = "zeroxide_step.py" if ours else f"{entry.engine}_step.py"
    try:
        return bench.run_ranks(
            side,
            worker,
            spec,
            world=entry.world,
            threads=options.threads,
            environment=bench.ALLOCATORS[entry.allocator],
            prefix=options.prefix,
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def slowest(job: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each measured step of a job, every phase as its slowest rank took it."""
    count = len(job[0]["steps"])
    return [
        {phase: max(rank["steps"][step][phase] for rank in job) for phase in PHASES}
        for step in range(FIRST_MEASURED_STEP, count)
    ]


def figures(jobs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """All jobs of one contestant, as medians."""
    steps = [step for job in jobs for step in slowest(job)]
    result: dict[str, Any] = {phase: bench.summary(step[phase] for step in steps) for phase in PHASES}
    result["peak_gb"] = bench.summary((max(rank["memory"]["peak"] for rank in job) / 1e9 for job in jobs), 3)
    for key in ("imported_rss", "setup_peak", "training_peak", "anon", "file"):
        result[f"{key}_gb"] = round(
            statistics.median(max(rank["memory"][key] for rank in job) for job in jobs) / 1e9, 3
        )
    result["losses"] = [round(step["loss"], 4) for step in jobs[0][0]["steps"]]
    first = jobs[0][0]
    if "sent_bytes" in first:
        measured = len(first["steps"])
        result["sent_bytes_per_parameter_and_step"] = round(first["sent_bytes"] / first["parameters"] / measured, 3)
    return result


def goals(model: str, results: dict[Entry, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised of this benchmark, for the contestants that ran."""
    found = []
    for entry, result in results.items():
        theirs = results.get(Entry("fsdp", entry.world, entry.allocator))
        if entry.engine == "zeroxide" and entry.world == 2 and theirs is not None and model == "124m":
            share = result["total"]["median"] / theirs["total"]["median"]
            found.append(bench.goal(f"step time of FSDP2's, {entry.allocator}", share, 0.85, at_most=True))
            share = result["peak_gb"]["median"] / theirs["peak_gb"]["median"]
            found.append(bench.goal(f"peak memory of FSDP2's, {entry.allocator}", share, 0.75, at_most=True))
        if entry.engine.startswith("zeroxide") and entry.world > 1:
            share = result["sent_bytes_per_parameter_and_step"] / (2 * (entry.world - 1) / entry.world)
            found.append(bench.goal(f"bytes sent by {entry.name}, of weights x (N-1)/N", share, 3.05, at_most=True))
    return found


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.set_defaults(threads=1)
    parser.add_argument("--model", choices=("tiny", "124m", "355m"), default="124m")
    parser.add_argument("--world", action="append", type=int, help="ranks (default 2)")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default all but zeroxide-collective")
    parser.add_argument("--allocator", action="append", choices=tuple(bench.ALLOCATORS), help="default both")
    parser.add_argument("--steps", type=int, default=6, help="steps a job; the first two are not measured")
    parser.add_argument("--batch", type=int, default=1, help="rows of a rank's batch")
    parser.add_argument("--sequence", type=int, default=128, help="tokens a row")
    options = parser.parse_args()
    options.world = options.world or [2]
    options.engine = options.engine or ["fsdp", "deepspeed", "zeroxide"]
    options.allocator = options.allocator or ["default", "keep"]

    bench.emit("machine", bench.machine(options.directory))
    entries = [
        Entry(engine, world, allocator)
        for world in options.world
        for allocator in options.allocator
        for engine in options.engine
    ]
    jobs: dict[Entry, list[list[dict[str, Any]]]] = {}
    failed = False
    for number in range(options.rounds):
        for entry in entries:
            bench.note(f"{options.model}, round {number + 1} of {options.rounds}: {entry.name}")
            try:
                jobs.setdefault(entry, []).append(run(entry, options.model, options))
            except bench.WorkerFailed as error:
                failed = True
                bench.note(str(error))
    results = {entry: figures(found) for entry, found in jobs.items() if found}
    for entry, result in results.items():
        bench.emit(
            "data_parallel", {"model": options.model, "contestant": entry.name, "jobs": len(jobs[entry]), **result}
        )
    for entry, result in results.items():
        for other, theirs in results.items():
            same = (other.world, other.allocator) == (entry.world, entry.allocator)
            if entry.engine.startswith("zeroxide") and not other.engine.startswith("zeroxide") and same:
                keys = (*PHASES, "peak_gb")
                shares = {key: round(result[key]["median"] / theirs[key]["median"], 3) for key in keys}
                bench.emit("data_parallel", {"ours": entry.name, "of": other.name, **shares})
    for line in goals(options.model, results):
        bench.emit("data_parallel", line)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
