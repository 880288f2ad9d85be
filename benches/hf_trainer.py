"""Hugging Face's Trainer with a DeepSpeed config, unchanged, under DeepSpeed and under zeroxide.

    python benches/hf_trainer.py --rounds 3

GPT-2 124 M from a folder of `save_pretrained`, batch 1 x 128, bf16, clipping at 1.0, AdamW of the config, 20 steps on
the CPU; both sides get the same script, the same packages and the same config ("lean" settings are tuned for the least
memory of DeepSpeed, "defaults" sets nothing that need not be set). A step is from the beginning of one to the beginning
of the next. Peak memory is the process's from its beginning to its end (VmHWM). Beside them: the same loop written by
hand over zeroxide's engine, and Trainer alone for the losses.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import side_by_side as bench

FIRST_MEASURED_STEP = 3
SETTINGS = ("lean", "defaults")
GOALS = {"nvme": (0.45, 0.30), "cpu": (0.50, 0.55)}
"""By home of the state: shares of DeepSpeed's step and of its peak memory."""


def saved_weights(side: bench.Side, model: str, directory: Path) -> Path:
    """The folder that both sides load, made once."""
    place = directory / f"gpt2-{model}"
    if not (place / "model.safetensors").exists():
        code = (
            f"import sys; sys.path.insert(0, {str(bench.WORKERS)!r}); import gpt2, torch; "
            "from transformers import GPT2LMHeadModel; torch.manual_seed(0); "
            f"GPT2LMHeadModel(gpt2.model_config({model!r})).save_pretrained({str(place)!r})"
        )
        subprocess.run([str(side.python), "-c", code], check=True, env=side.variables({}, 2))
    return place


def contestants(options: argparse.Namespace) -> dict[str, tuple[bench.Side, dict[str, Any], dict[str, str]]]:
    """Who runs, by name: the interpreter, what the worker is told, and its environment."""
    ours, peers = bench.zeroxide_among_peers(), bench.peers_side()
    allocator = bench.ALLOCATORS[options.allocator]
    named = {"ZEROXIDE_AS_DEEPSPEED": "1"} | allocator
    found: dict[str, tuple[bench.Side, dict[str, Any], dict[str, str]]] = {}
    for offload in options.offload:
        for settings in options.settings:
            given = {"offload": offload, "settings": settings, "how": "trainer"}
            found[f"deepspeed {offload} {settings}"] = peers, given, allocator
            found[f"zeroxide {offload} {settings}"] = ours, given, named
        found[f"zeroxide {offload} loop"] = ours, {"offload": offload, "settings": "defaults", "how": "loop"}, named
    if options.ours:
        return {name: found[name] for name in found if name.startswith("zeroxide ")}
    alone = {"offload": "none", "settings": "defaults", "how": "alone"}
    return found | {"trainer alone": (ours, alone, allocator)}


def run(
    side: bench.Side, given: dict[str, Any], environment: dict[str, str], weights: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One process; its scratch files are gone afterwards."""
    scratch = options.directory / "hf-trainer"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    spec = {"model": options.model, "rows": 1, "columns": 128, "steps": options.steps, "stage": 3} | given
    spec |= {"directory": str(scratch), "weights": str(weights), "threads": options.threads}
    try:
        return bench.run_worker(
            side, "hf_trainer.py", spec, threads=options.threads, environment=environment, prefix=options.prefix
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def report(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Prints medians, and ratios with their goals."""
    for name, runs in found.items():
        bench.emit(
            "hf_trainer",
            {
                "contestant": name,
                "allocator": options.allocator,
                "step": bench.summary(step_seconds(runs)),
                "peak_bytes": statistics.median(peak_bytes(runs)),
                "first_step_after": round(statistics.median(run["first_step_after"] for run in runs), 2),
                "losses": [round(loss, 4) for loss in runs[0]["losses"]],
            },
        )
    for offload in options.offload:
        for settings in options.settings:
            if options.ours:
                continue
            theirs, own = found[f"deepspeed {offload} {settings}"], found[f"zeroxide {offload} {settings}"]
            step_goal, peak_goal = GOALS[offload]
            of = f"{offload} {settings}, {options.allocator} allocator"
            step, peak = median_step(own) / median_step(theirs), median_peak(own) / median_peak(theirs)
            bench.emit("hf_trainer", bench.goal(f"{of}: step of DeepSpeed's", step, step_goal, at_most=True))
            bench.emit("hf_trainer", bench.goal(f"{of}: peak memory of DeepSpeed's", peak, peak_goal, at_most=True))
        if "defaults" in options.settings:
            over = (
                median_step(found[f"zeroxide {offload} defaults"]) / median_step(found[f"zeroxide {offload} loop"]) - 1
            )
            bench.emit("hf_trainer", bench.goal(f"{offload}: what Trainer takes over a loop", over, 0.03, at_most=True))


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--model", default="124m", help="size (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run (default %(default)s)")
    parser.add_argument(
        "--offload", nargs="+", default=list(GOALS), choices=GOALS, help="homes of the state (default both)"
    )
    parser.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="configs (default both)"
    )
    parser.add_argument("--ours", action="store_true", help="without DeepSpeed: Trainer beside the loop alone")
    parser.add_argument("--allocator", default="keep", choices=bench.ALLOCATORS, help="default %(default)s")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    bench.emit("hf_trainer", bench.machine(options.directory))
    weights = saved_weights(bench.zeroxide_side(), options.model, options.directory)
    those = contestants(options)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in those}
    for _ in range(options.rounds):
        for name, (side, given, environment) in those.items():
            found[name].append(run(side, given, environment, weights, options))
    report(found, options)


def step_seconds(runs: list[dict[str, Any]]) -> list[float]:
    """Of every step that counts."""
    return [seconds for run in runs for seconds in run["seconds"][FIRST_MEASURED_STEP:]]


def peak_bytes(runs: list[dict[str, Any]]) -> list[int]:
    """Of every run, from its beginning on: zeroxide has the kernel count anew from `initialize`."""
    return [max(run["memory"][when]["peak"] for when in ("built", "end")) for run in runs]


def median_step(runs: list[dict[str, Any]]) -> float:
    return statistics.median(step_seconds(runs))


def median_peak(runs: list[dict[str, Any]]) -> float:
    return statistics.median(peak_bytes(runs))


if __name__ == "__main__":
    sys.exit(main())
