"""Hugging Face's Trainer with a DeepSpeed config, unchanged, under DeepSpeed and under zeroxide.

    python benches/hf_trainer.py --rounds 3

GPT-2 124 M from a folder of `save_pretrained`, batch 1 x 128, bf16, clipping at 1.0, AdamW of the config, 20 steps on
the CPU; both sides get the same script and the same config ("lean" settings are tuned for DeepSpeed's least memory,
"defaults" sets nothing that need not be set). A step is from the beginning of one to the beginning of the next. Peak
memory is the process's (VmHWM). Beside them: the same loop written by hand over zeroxide's engine, and Trainer alone
for the losses.
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
    ours, peers = bench.zeroxide_side(), bench.peers_side()
    allocator = bench.ALLOCATORS[options.allocator]
    named = {"ZEROXIDE_AS_DEEPSPEED": "1"} | allocator
    found: dict[str, tuple[bench.Side, dict[str, Any], dict[str, str]]] = {}
    for offload in options.offload:
        for settings in options.settings:
            given = {"offload": offload, "settings": settings, "how": "trainer"}
            found[f"deepspeed {offload} {settings}"] = peers, given, allocator
            found[f"zeroxide {offload} {settings}"] = ours, given, named
        found[f"zeroxide {offload} loop"] = ours, {"offload": offload, "settings": "defaults", "how": "loop"}, named
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
        first = statistics.median(run["first_step_after"] for run in runs)
        losses = " ".join(f"{loss:.3f}" for loss in runs[0]["losses"][:: max(1, options.steps // 5)])
        print(
            f"{name:26s} step {median_step(runs):6.3f} s  peak {median_peak(runs) / 2**30:5.2f} GiB  "
            f"first step after {first:5.1f} s  losses {losses}"
        )
    for offload in options.offload:
        goals = "" if offload not in GOALS else "  (goals {}, {})".format(*GOALS[offload])
        for settings in options.settings:
            theirs, own = found[f"deepspeed {offload} {settings}"], found[f"zeroxide {offload} {settings}"]
            step, peak = median_step(own) / median_step(theirs), median_peak(own) / median_peak(theirs)
            print(f"{offload} {settings}: step {step:.2f}, peak {peak:.2f} of DeepSpeed's{goals}")
        if "defaults" in options.settings:
            loop = median_step(found[f"zeroxide {offload} loop"])
            print(f"{offload}: Trainer takes {median_step(found[f'zeroxide {offload} defaults']) / loop - 1:+.1%}")


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--model", default="124m", help="size (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run (default %(default)s)")
    parser.add_argument("--offload", nargs="+", default=["nvme", "cpu"], help="homes of the state (default both)")
    parser.add_argument("--settings", nargs="+", default=["lean", "defaults"], help="configs (default both)")
    parser.add_argument("--allocator", default="keep", choices=bench.ALLOCATORS, help="default %(default)s")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    weights = saved_weights(bench.zeroxide_side(), options.model, options.directory)
    those = contestants(options)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in those}
    for _ in range(options.rounds):
        for name, (side, given, environment) in those.items():
            found[name].append(run(side, given, environment, weights, options))
    report(found, options)


def median_step(runs: list[dict[str, Any]]) -> float:
    return statistics.median(s for run in runs for s in run["seconds"][FIRST_MEASURED_STEP:])


def median_peak(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["memory"]["end"]["peak"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
