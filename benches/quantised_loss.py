"""Losses of a tiny GPT with quantised collectives beside the exact run, over four ranks in two groups.

    python benches/quantised_loss.py
    python benches/quantised_loss.py --steps 200 --only exact --only all

A GPT of 0.9 M parameters learns the bytes of this repository's documents, in bf16, batch 4 x 64 a rank. All runs have
the same initial weights and batches, but for `exact, other batches`: the same training by another draw, whose distance
from the exact run shows how much chance alone makes. For each run: the mean loss of every tenth of the steps, the loss
of text that was left out of training, and the bytes that a rank sent for each parameter and step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import side_by_side as bench

WORLD = 4
GROUPS = {"zero_hpz_partition_size": 2}
INT8, INT4 = {"zero_quantized_weights": True}, {"zero_quantized_gradients": True}
LOCO = {"zeropp_loco_param": {}}
RUNS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, other batches": {"order": 1},
    "int8 weights": INT8,
    "int4 gradients": INT4,
    "int4 gradients, error feedback": {**INT4, **LOCO},
    "all, two groups": {**INT8, **INT4, **LOCO, **GROUPS},
}
ALLOWED = 0.02
"""Of the exact run's loss on text that was left out: what the goal allows a lossy run to be above it."""


def corpus(folder: Path) -> Path:
    """The repository's documents, one after the other."""
    root = Path(__file__).parents[1]
    found = [
        root / "ARCHITECTURE.md",
        root / "CONTRIBUTING.md",
        root / "README.md",
        *sorted((root / "docs").glob("*.md")),
    ]
    path = folder / "text"
    path.write_bytes(b"\n".join(each.read_bytes() for each in found))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="compute threads of a rank (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    parser.add_argument("--only", action="append", choices=RUNS, help="which runs beside the exact one (default all)")
    options = parser.parse_args()
    bench.emit("machine", bench.machine())
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="zeroxide-bench-") as folder:
        text = corpus(Path(folder))
        for name in dict.fromkeys(["exact", *(options.only or RUNS)]):
            bench.note(f"{options.steps} steps: {name}")
            zero = dict(RUNS[name])
            spec = {
                "text": str(text),
                "steps": options.steps,
                "seed": 0,
                "order": zero.pop("order", 0),
                "config": {
                    "zero_optimization": {"stage": 3, **zero},
                    "zeroxide": {"transport": "collective", "threads": options.threads},
                },
                "rows": 4,
                "columns": 64,
                "threads": options.threads,
            }
            job = bench.run_ranks(
                bench.zeroxide_side(), "quantised_loss.py", spec, world=WORLD, threads=options.threads
            )
            results[name] = job[0]
            bench.emit("quantised_loss", {"run": name, **figures(job[0], options.steps)})
    exact = results["exact"]["held_out"]
    missed = False
    for name, result in results.items():
        if not name.startswith("exact"):
            line = bench.goal(
                f"loss on text left out, {name}, of the exact run's",
                result["held_out"] / exact,
                1 + ALLOWED,
                at_most=True,
            )
            missed |= not line["met"]
            bench.emit("quantised_loss", line)
    if missed:
        sys.exit("benches: error: a lossy run is too far from the exact one")


def figures(result: dict[str, Any], steps: int) -> dict[str, Any]:
    """One run in a few numbers."""
    tenth = max(1, steps // 10)
    losses = result["losses"]
    return {
        "losses": [round(statistics.mean(losses[at : at + tenth]), 4) for at in range(0, steps, tenth)],
        "held_out": round(result["held_out"], 4),
        "sent_bytes_per_parameter_and_step": round(result["sent"] / result["parameters"], 3),
        "parameters": result["parameters"],
    }


if __name__ == "__main__":
    main()
