"""GPT-2 in two stages of a pipeline: its step beside DeepSpeed's, and, with all on disk, its memory beside one process.

    python benches/pipeline.py --rounds 3

The same script on both sides, DeepSpeed's PipelineModule of layers: a rank each stage with `--threads` threads, 8
micro-batches of 1 x 128 a step, bf16, clipping at 1.0, AdamW, the same initial weights and batches, ZeRO-1. zeroxide
also runs ZeRO-3 with weights and state on disk inside the stages, which DeepSpeed refuses, beside the same in one
process. A round runs each contestant once. A step takes as long as its slowest rank; memory is the largest rank's peak
(VmHWM).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import side_by_side as bench

# Of each job, the steps before this one warm up.
FIRST_MEASURED_STEP = 2
STEP_GOAL, PEAK_GOAL = 0.5, 0.6


@dataclass(frozen=True)
class Entry:
    """One contestant."""

    engine: str
    zero: str
    stages: int

    @property
    def name(self) -> str:
        """What results call it."""
        return f"{self.engine} {self.zero} x{self.stages}"


ENTRIES = (
    Entry("deepspeed", "1", 2),
    Entry("zeroxide", "1", 2),
    Entry("zeroxide", "3 nvme", 2),
    Entry("zeroxide", "3 nvme", 1),
)


def run(entry: Entry, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One job; the results of its ranks."""
    directory = options.directory / "pipeline"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    zero: dict[str, Any] = {"stage": int(entry.zero[0])}
    if entry.zero.endswith("nvme"):
        zero |= {
            part: {"device": "nvme", "nvme_path": str(directory)} for part in ("offload_optimizer", "offload_param")
        }
    spec = {
        "model": options.model,
        "rows": options.batch,
        "columns": options.sequence,
        "accumulation": options.accumulation,
        "steps": options.steps,
        "threads": options.threads,
        "zero": zero,
    }
    ours = entry.engine == "zeroxide"
    side = bench.zeroxide_among_peers() if ours else bench.peers_side()
    environment = bench.ALLOCATORS[options.allocator] | ({"ZEROXIDE_AS_DEEPSPEED": "1"} if ours else {})
    try:
        return bench.run_ranks(
            side, "pipeline_step.py", spec, world=entry.stages, threads=options.threads, environment=environment
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def figures(jobs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """All jobs of one contestant, as medians."""
    measured = range(FIRST_MEASURED_STEP, len(jobs[0][0]["steps"]))
    found: dict[str, Any] = {
        "total": bench.summary(max(rank["steps"][step]["total"] for rank in job) for job in jobs for step in measured),
        "peak_gb": bench.summary((max(rank["memory"]["peak"] for rank in job) / 1e9 for job in jobs), 3),
        "losses": [round(step["loss"], 4) for step in jobs[0][0]["steps"]],
    }
    for key in ("imported_rss", "setup_peak", "training_peak"):
        found[f"{key}_gb"] = [round(rank["memory"][key] / 1e9, 3) for rank in jobs[0]]
    for key in ("read_bytes", "write_bytes"):
        found[key] = statistics.median(
            sum(rank["steps"][step][key] for rank in job) for job in jobs for step in measured
        )
    return found


def goals(results: dict[Entry, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised of this benchmark, for the contestants that ran."""
    found = []
    theirs, ours, disk, alone = (results.get(entry) for entry in ENTRIES)
    if theirs and ours:
        share = ours["total"]["median"] / theirs["total"]["median"]
        found.append(bench.goal("step of DeepSpeed's pipeline, ZeRO-1", share, STEP_GOAL, at_most=True))
    if disk and alone:
        share = disk["peak_gb"]["median"] / alone["peak_gb"]["median"]
        found.append(bench.goal("peak memory of one process, ZeRO-3 on disk", share, PEAK_GOAL, at_most=True))
    return found


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.set_defaults(threads=1)
    parser.add_argument("--model", choices=("tiny", "124m", "355m"), default="124m")
    parser.add_argument("--allocator", choices=tuple(bench.ALLOCATORS), default="default")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps a job; the first two are not measured")
    parser.add_argument("--batch", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--sequence", type=int, default=128, help="tokens a row")
    parser.add_argument("--ours", action="store_true", help="without DeepSpeed")
    options = parser.parse_args()

    bench.emit("machine", bench.machine(options.directory))
    entries = [entry for entry in ENTRIES if not (options.ours and entry.engine == "deepspeed")]
    jobs: dict[Entry, list[list[dict[str, Any]]]] = {}
    failed = False
    for number in range(options.rounds):
        for entry in entries:
            bench.note(f"{options.model}, round {number + 1} of {options.rounds}: {entry.name}")
            try:
                jobs.setdefault(entry, []).append(run(entry, options))
            except bench.WorkerFailed as error:
                bench.note(str(error))
                failed = True
    results = {entry: figures(found) for entry, found in jobs.items() if found}
    for entry, result in results.items():
        bench.emit("pipeline", {"contestant": entry.name, **result})
    for goal in goals(results):
        bench.emit("pipeline", goal)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
