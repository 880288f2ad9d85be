"""The whole training step of GPT-2 beside DeepSpeed ZeRO-3: time by phase, peak memory, disk bytes.

    python benches/train_step.py --model 124m --model 355m --rounds 3

Every run is a process of its own: batch 1 x 128, bf16, clipping at 1.0, AdamW, the same initial weights and the same
batches on both sides. A round runs each contestant once. Peak memory is that of the whole process (VmHWM), Python,
torch and the making of the model included; disk bytes are the kernel's count for the process (/proc/self/io).

With state on disk zeroxide's step returns while the update is under way, and each unit's is waited for when the next
forward needs it. So its phases say little one by one: `total` is what a step takes. For a fair look at the optimizer
phase alone, "zeroxide nvme drained" waits for the end of the update before the step ends.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import side_by_side as bench

# Of each run, the steps before this one warm up: caches, recorded gather order, first touch of memory.
FIRST_MEASURED_STEP = 2
PHASES = ("forward", "backward", "step", "total")
# The share of DeepSpeed's peak memory that zeroxide may take with everything on disk.
PEAK_GOALS = {"124m": 0.36, "355m": 0.33}


@dataclass(frozen=True)
class Entry:
    """One contestant: an engine, where its state lives, and the allocator's setting."""

    engine: str
    offload: str
    allocator: str
    settings: str = ""

    @property
    def name(self) -> str:
        """What results call it."""
        return " ".join(filter(None, (self.engine, self.offload, self.settings, self.allocator)))


def entries(options: argparse.Namespace) -> list[Entry]:
    """Both engines for every kind of offload, the peer first."""
    found = []
    for offload in options.offload:
        for allocator in options.allocator:
            for settings in options.peer:
                # "disk" is about parameters on NVMe, so with CPU offload there is no such thing.
                if settings != "disk" or offload == "nvme":
                    found.append(Entry("deepspeed", offload, allocator, settings))
            found.append(Entry("zeroxide", offload, allocator))
            if offload == "nvme":
                found.append(Entry("zeroxide", offload, allocator, "drained"))
                if options.compact:
                    found.append(Entry("zeroxide", offload, allocator, "compact"))
    if options.floor:
        found += [Entry("torch", "none", allocator, "no update") for allocator in options.allocator]
    return found


def run(entry: Entry, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process: `options.steps` steps of `model`; its scratch files are gone afterwards."""
    directory = options.directory / "train-step"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    spec = {
        "model": model,
        "rows": options.batch,
        "columns": options.sequence,
        "steps": options.steps,
        "offload": entry.offload,
        "directory": str(directory),
        "settings": entry.settings,
        "threads": options.threads,
    }
    if entry.engine == "zeroxide" and entry.offload == "nvme":
        spec["host_memory"] = options.host_memory
        if entry.settings == "compact":
            spec["offload"] = None
            spec["config"] = {
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "cpu"},
                    "offload_optimizer": {"device": "nvme", "nvme_path": str(directory)},
                },
                "zeroxide": {"format": "compact", "gradients": "host"},
            }
    side = bench.zeroxide_among_peers() if entry.engine == "zeroxide" else bench.peers_side()
    try:
        return bench.run_worker(
            side,
            f"{entry.engine}_step.py",
            spec,
            threads=options.threads,
            environment=bench.ALLOCATORS[entry.allocator],
            prefix=options.prefix,
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The measured steps of all runs of one contestant, as medians."""
    steps = [step for run in runs for step in run["steps"][FIRST_MEASURED_STEP:]]
    parameters = runs[0]["parameters"]
    result: dict[str, Any] = {phase: bench.summary(step[phase] for step in steps) for phase in PHASES}
    result["forward_backward"] = bench.summary(step["forward"] + step["backward"] for step in steps)
    for key in ("read_bytes", "write_bytes"):
        per_step = statistics.median(step[key] for step in steps)
        result[f"{key}_per_parameter"] = round(per_step / parameters, 2)
    result["peak_gb"] = bench.summary((run["memory"]["peak"] / 1e9 for run in runs), 3)
    for key in ("imported_rss", "setup_peak", "training_peak"):
        result[f"{key}_gb"] = round(statistics.median(run["memory"][key] for run in runs) / 1e9, 3)
    result["setup_seconds"] = round(statistics.median(run["setup_seconds"] for run in runs), 2)
    result["losses"] = [round(step["loss"], 4) for step in runs[0]["steps"]]
    return result


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours as a share of theirs: below 1 is faster, or smaller."""
    keys = (*PHASES, "forward_backward", "peak_gb")
    return {key: round(ours[key]["median"] / theirs[key]["median"], 3) for key in keys}


def goals(model: str, results: dict[Entry, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised of this benchmark, for the contestants that ran."""
    found = []

    def compare(name: str, key: str, bound: float, ours: Entry, theirs: Entry) -> None:
        if ours in results and theirs in results:
            share = results[ours][key]["median"] / results[theirs][key]["median"]
            found.append(bench.goal(f"{model}: {name}", share, bound, at_most=True))

    for allocator in bench.ALLOCATORS:
        ours, theirs = Entry("zeroxide", "nvme", allocator), Entry("deepspeed", "nvme", allocator, "lean")
        if model in PEAK_GOALS:
            compare(f"peak memory of theirs, nvme, {allocator}", "peak_gb", PEAK_GOALS[model], ours, theirs)
        if model == "124m":
            drained = Entry("zeroxide", "nvme", allocator, "drained")
            compare(f"optimizer phase, drained, of theirs, nvme, {allocator}", "step", 0.7, drained, theirs)
            ours, theirs = Entry("zeroxide", "cpu", allocator), Entry("deepspeed", "cpu", allocator, "lean")
            compare(f"optimizer phase of theirs, cpu, {allocator}", "step", 0.65, ours, theirs)
            compare(
                f"forward + backward ({allocator}) of theirs with freed memory kept, cpu",
                "forward_backward",
                1.0,
                ours,
                Entry("deepspeed", "cpu", "keep", "lean"),
            )
        ours = Entry("zeroxide", "nvme", allocator)
        if ours in results:
            moved = sum(results[ours][f"{key}_bytes_per_parameter"] for key in ("read", "write"))
            found.append(
                bench.goal(f"{model}: disk bytes a parameter and step, {allocator}", moved, 28.5, at_most=True)
            )
    return found


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--model", action="append", choices=("tiny", "124m", "355m", "774m"), help="default 124m")
    parser.add_argument("--offload", action="append", choices=("nvme", "cpu", "none"), help="default nvme and cpu")
    parser.add_argument(
        "--allocator", action="append", choices=tuple(bench.ALLOCATORS), help="default 'default' and 'keep'"
    )
    parser.add_argument(
        "--peer",
        action="append",
        choices=("lean", "disk", "defaults"),
        help="DeepSpeed's settings: least memory (default), parameters really on disk, its defaults",
    )
    parser.add_argument(
        "--compact", action="store_true", help="also with nvme: bf16 weights in memory, 3 bytes of state on disk"
    )
    parser.add_argument("--floor", action="store_true", help="also PyTorch's forward and backward without an update")
    parser.add_argument("--steps", type=int, default=6, help="steps a run; the first two are not measured")
    parser.add_argument("--batch", type=int, default=1, help="rows of the batch")
    parser.add_argument("--sequence", type=int, default=128, help="tokens a row")
    parser.add_argument("--host-memory", help="zeroxide's budget with nvme, as in 1300MiB (default none)")
    options = parser.parse_args()
    options.model = options.model or ["124m"]
    options.offload = options.offload or ["nvme", "cpu"]
    options.allocator = options.allocator or ["default", "keep"]
    options.peer = options.peer or ["lean"]
    if options.steps <= FIRST_MEASURED_STEP:
        parser.error(f"--steps must be more than the {FIRST_MEASURED_STEP} that warm up")

    bench.emit("machine", bench.machine(options.directory))
    failed = False
    for model in options.model:
        runs: dict[Entry, list[dict[str, Any]]] = {}
        for number in range(options.rounds):
            for entry in entries(options):
                bench.note(f"{model}, round {number + 1} of {options.rounds}: {entry.name}")
                try:
                    runs.setdefault(entry, []).append(run(entry, model, options))
                except bench.WorkerFailed as error:
                    failed = True
                    bench.note(str(error))
        results = {entry: figures(found) for entry, found in runs.items() if found}
        for entry, result in results.items():
            bench.emit("train_step", {"model": model, "contestant": entry.name, "runs": len(runs[entry]), **result})
        for entry, result in results.items():
            if entry.engine == "zeroxide":
                for other, theirs in results.items():
                    if other.engine != "zeroxide" and other.offload == entry.offload:
                        bench.emit(
                            "train_step",
                            {"model": model, "ours": entry.name, "of": other.name, **ratios(result, theirs)},
                        )
        for entry, result in results.items():
            if entry.engine == "torch":
                # What is computed, as a share of the peers' whole steps: no engine's share is smaller.
                share = {
                    other.name: round(result["total"]["median"] / theirs["total"]["median"], 3)
                    for other, theirs in results.items()
                    if other.engine == "deepspeed"
                }
                bench.emit("train_step", {"model": model, "floor": entry.name, "of": share})
        for line in goals(model, results):
            bench.emit("train_step", line)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
