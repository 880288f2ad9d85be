"""Two builds of zeroxide beside one another: the whole step of GPT-2, and the optimizer kernels.

    python benches/builds.py --base ../before --rounds 5
    python benches/builds.py --base ../before --case ranks --case kernels

`--base` is another checkout with its extension module at `python/zeroxide/_core.abi3.so`, and so has this one. Both run
in this interpreter, in turns, and every other round the other one first. The losses of both must be the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import side_by_side as bench

WARM_UP = 2
CASES = {
    "nvme": {"world": 1, "offload": "nvme"},
    "cpu": {"world": 1, "offload": "cpu"},
    "ranks": {"world": 2, "offload": "none"},
}


def steps(tree: Path, case: str, options: argparse.Namespace) -> tuple[list[dict[str, float]], list[float]]:
    """One run of `case` by the build in `tree`: the measured steps of the slowest rank, and the losses of all ranks."""
    settings: dict[str, Any] = CASES[case]
    world = settings["world"]
    threads = max(1, options.threads // world)
    directory = options.directory / "builds"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    spec = {
        "model": options.model,
        "rows": 1,
        "columns": 128,
        "steps": WARM_UP + options.steps,
        "offload": settings["offload"],
        "directory": str(directory),
        "threads": threads,
        "config": {"zero_optimization": {"stage": 3}, "zeroxide": {"threads": threads}, "steps_per_print": None},
    }
    try:
        side = bench.Side(Path(sys.executable), {"PYTHONPATH": str(tree / "python")})
        found = bench.run_ranks(side, "zeroxide_step.py", spec, world=world, threads=threads, prefix=options.prefix)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    slowest = max(found, key=lambda one: statistics.median(step["total"] for step in one["steps"]))
    return slowest["steps"][WARM_UP:], [step["loss"] for one in found for step in one["steps"]]


def compare_steps(trees: dict[str, Path], case: str, options: argparse.Namespace) -> None:
    """Prints the step of both builds and their ratio."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    losses: dict[str, list[float]] = {name: [] for name in trees}
    ratios = []
    for number in range(options.rounds):
        bench.note(f"{case}, round {number + 1} of {options.rounds}")
        medians = {}
        for name in sorted(trees, reverse=number % 2 == 1):
            run, seen = steps(trees[name], case, options)
            taken[name].extend(run)
            losses[name].extend(seen)
            medians[name] = statistics.median(step["total"] for step in run)
        ratios.append(medians["this"] / medians["base"])
    totals = {name: bench.summary(step["total"] for step in found) for name, found in taken.items()}
    bench.emit(
        "builds",
        {
            "case": case,
            "model": options.model,
            **totals,
            "ratio": round(totals["this"]["median"] / totals["base"]["median"], 4),
            "ratio_of_rounds": bench.summary(ratios, 4),
            "phases": {
                phase: round(
                    statistics.median(step[phase] for step in taken["this"])
                    / statistics.median(step[phase] for step in taken["base"]),
                    3,
                )
                for phase in ("forward", "backward", "step")
            },
            "same_losses": losses["this"] == losses["base"],
        },
    )


def compare_kernels(trees: dict[str, Path], options: argparse.Namespace) -> None:
    """Prints how near the kernels of both builds come to the streaming floor."""
    binaries = {name: bench.cargo_example("zeroxide-optim", "adam_bench", tree) for name, tree in trees.items()}
    taken: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        bench.note(f"kernels, round {number + 1} of {options.rounds}")
        for name in sorted(trees, reverse=number % 2 == 1):
            command = [*options.prefix, str(binaries[name]), "--params", "64000000", "--threads", str(options.threads)]
            done = subprocess.run(
                [*command, "--repetitions", "7"],
                env=bench.Side(Path(sys.executable)).variables(bench.HUGE_PAGES, options.threads),
                capture_output=True,
                text=True,
                check=True,
            )
            for kind, report in json.loads(done.stdout).items():
                if isinstance(report, dict):
                    taken.setdefault((kind, name), []).append(report)
    for (kind, name), found in taken.items():
        bench.emit(
            "builds",
            {
                "case": "kernels",
                "format": kind,
                "build": name,
                "step_seconds": bench.summary(one["step_s"] for one in found),
                "share_of_floor": bench.summary((one["ratio_median"] for one in found), 4),
            },
        )


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--base", type=Path, required=True, help="the checkout of the other build")
    parser.add_argument("--case", action="append", choices=(*CASES, "kernels"), help="default all")
    parser.add_argument("--model", choices=("tiny", "124m", "355m"), default="124m")
    parser.add_argument("--steps", type=int, default=10, help="measured steps a run")
    options = parser.parse_args()
    trees = {"this": bench.REPOSITORY, "base": options.base.resolve()}
    for name, tree in trees.items():
        if not (tree / "python" / "zeroxide" / "_core.abi3.so").exists():
            parser.error(
                f"{name}: no extension module in {tree / 'python' / 'zeroxide'}: put the built lib_core.so there"
            )

    bench.emit("machine", bench.machine(options.directory))
    for case in options.case or (*CASES, "kernels"):
        if case == "kernels":
            compare_kernels(trees, options)
        else:
            compare_steps(trees, case, options)


if __name__ == "__main__":
    main()
