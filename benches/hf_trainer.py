"""Hugging Face's Trainer with a DeepSpeed config, unchanged, under DeepSpeed and under zeroxide.

    python benches/hf_trainer.py --rounds 3

GPT-2 124 M from a folder of `save_pretrained`, batch 1 x 128, bf16, clipping at 1.0, AdamW of the config, 20 steps on
the CPU; both sides get the same script and the same config ("lean" settings are tuned for DeepSpeed's least memory,
"defaults" sets nothing that need not be set). A step is from the beginning of one to the beginning of the next. Peak
memory is the process's (VmHWM). Beside them: the same loop written by hand over zeroxide's engine, and Trainer alone
for the losses.
"""

from __future__ import annotations

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


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--model", default="124m", help="size (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run (default %(default)s)")
    parser.add_argument("--offload", nargs="+", default=["nvme", "cpu"], help="homes of the state (default both)")
    parser.add_argument("--settings", nargs="+", default=["lean", "defaults"], help="configs (default both)")
    parser.add_argument("--allocator", default="keep", choices=bench.ALLOCATORS, help="default %(default)s")
    options = parser.parse_args()
    ours, peers = bench.zeroxide_side(), bench.peers_side()
    options.directory.mkdir(parents=True, exist_ok=True)
    weights = saved_weights(ours, options.model, options.directory)
    named = {"ZEROXIDE_AS_DEEPSPEED": "1"} | bench.ALLOCATORS[options.allocator]
    contestants: list[tuple[str, bench.Side, dict[str, Any], dict[str, str]]] = []
    for offload in options.offload:
        for settings in options.settings:
            given = {"offload": offload, "settings": settings, "how": "trainer"}
            tail = f"{offload} {settings}"
            contestants.append((f"deepspeed {tail}", peers, given, bench.ALLOCATORS[options.allocator]))
            contestants.append((f"zeroxide {tail}", ours, given, named))
        contestants.append(
            (f"zeroxide {offload} loop", ours, {"offload": offload, "settings": "defaults", "how": "loop"}, named)
        )
    alone = {"offload": "none", "settings": "defaults", "how": "alone"}
    contestants.append(("trainer alone", ours, alone, bench.ALLOCATORS[options.allocator]))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in contestants}
    for _ in range(options.rounds):
        for name, side, given, environment in contestants:
            scratch = options.directory / "hf-trainer"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            spec = given | {"model": options.model, "rows": 1, "columns": 128, "steps": options.steps, "stage": 3}
            spec |= {"directory": str(scratch), "weights": str(weights), "threads": options.threads}
            found[name].append(
                bench.run_worker(
                    side, "hf_trainer.py", spec, threads=options.threads, environment=environment, prefix=options.prefix
                )
            )
            shutil.rmtree(scratch, ignore_errors=True)
    for name, runs in found.items():
        step = statistics.median(s for run in runs for s in run["seconds"][FIRST_MEASURED_STEP:])
        peak = statistics.median(run["memory"]["end"]["peak"] for run in runs)
        first = statistics.median(run["first_step_after"] for run in runs)
        print(f"{name:28s} step {step:6.3f} s  peak {peak / 2**30:5.2f} GiB  first step after {first:5.1f} s", end="")
        print("  losses " + " ".join(f"{loss:.3f}" for loss in runs[0]["losses"][:: max(1, options.steps // 5)]))
    for offload in options.offload:
        goals = GOALS.get(offload)
        for settings in options.settings:
            theirs, own = found[f"deepspeed {offload} {settings}"], found[f"zeroxide {offload} {settings}"]
            ratio = median_step(own) / median_step(theirs)
            memory = median_peak(own) / median_peak(theirs)
            goal = "" if goals is None else f"  (goals {goals[0]}, {goals[1]})"
            print(f"{offload} {settings}: step {ratio:.2f}, peak {memory:.2f} of DeepSpeed's{goal}")
        if "defaults" in options.settings:
            loop = median_step(found[f"zeroxide {offload} loop"])
            print(f"{offload}: Trainer takes {median_step(found[f'zeroxide {offload} defaults']) / loop - 1:+.1%}")


def median_step(runs: list[dict[str, Any]]) -> float:
    return statistics.median(s for run in runs for s in run["seconds"][FIRST_MEASURED_STEP:])


def median_peak(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["memory"]["end"]["peak"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
