"""The CPU optimizer step beside DeepSpeedCPUAdam, torch's fused AdamW, and the streaming floor.

    python benches/cpu_adam.py --parameters 100000000 --rounds 10

The floor (Rust example `adam_bench`) reads and writes the same arrays as our step, with almost no arithmetic. It says
nothing about a step over other arrays, even of as many bytes. Contestants are processes that wait for their turn; a
round gives each a few steps. All of them have their arrays in huge pages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from dataclasses import dataclass, field
from typing import Any

import side_by_side as bench

PEER_KINDS = ("torch-fp32", "deepspeed-fp32", "deepspeed-bf16")
OUR_KINDS = ("zeroxide-fp32", "zeroxide-bf16", "zeroxide-split")
# The kernel, by what it is compared with: same arrays, same bytes.
PAIRS = (
    ("zeroxide-fp32", "torch-fp32"),
    ("zeroxide-fp32", "deepspeed-fp32"),
    ("zeroxide-bf16", "deepspeed-bf16"),
    ("zeroxide-split", "deepspeed-bf16"),
    ("zeroxide-split", "deepspeed-fp32"),
)


def kernel_round(options: argparse.Namespace, binary: str) -> dict[str, Any]:
    """One run of the Rust example: step and floor of both exact formats, interleaved in one process."""
    command = [*options.prefix, binary, "--params", str(options.parameters), "--threads", str(options.threads)]
    done = subprocess.run(
        [*command, "--repetitions", str(options.steps)],
        env=os.environ | bench.HUGE_PAGES,
        capture_output=True,
        text=True,
        check=True,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@dataclass
class Measured:
    """Reports of the Rust example by format, and times and what it is of every contestant."""

    kernels: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"fp32": [], "split": []})
    isa: str = ""
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)


def measure(options: argparse.Namespace) -> Measured:
    """All rounds of all contestants."""
    binary = str(bench.cargo_example("zeroxide-optim", "adam_bench"))
    measured = Measured()
    contestants: dict[str, bench.Contestant] = {}
    try:
        for kind in (*PEER_KINDS, *OUR_KINDS):
            bench.note(f"starting {kind}")
            contestants[kind] = bench.Contestant(
                bench.zeroxide_side() if kind in OUR_KINDS else bench.peers_side(),
                "adam.py",
                {
                    "kind": kind,
                    "parameters": options.parameters,
                    "tensors": options.tensors,
                    "steps": options.steps,
                    "threads": options.threads,
                },
                threads=options.threads,
                environment=bench.HUGE_PAGES,
            )
        for number in range(options.rounds):
            bench.note(f"round {number + 1} of {options.rounds}")
            report = kernel_round(options, binary)
            measured.isa = report["isa"]
            for name, found in measured.kernels.items():
                found.append(report[name])
            for kind, contestant in contestants.items():
                answer = contestant.round()
                measured.seconds.setdefault(kind, []).extend(answer["seconds"])
                measured.cpu.setdefault(kind, []).extend(answer["cpu_seconds"])
        measured.about = {kind: contestant.about for kind, contestant in contestants.items()}
    finally:
        for contestant in contestants.values():
            contestant.close()
    return measured


def report_kernels(options: argparse.Namespace, measured: Measured) -> dict[str, float]:
    """Prints the kernels beside their floors. Returns the median seconds of each floor."""
    floors = {}
    for name, found in measured.kernels.items():
        floor = bench.summary(one["floor_s"] for one in found)
        step = bench.summary(one["step_s"] for one in found)
        floors[name] = floor["median"]
        share = bench.summary((one["ratio_median"] for one in found), 4)
        bench.emit(
            "cpu_adam",
            {
                "contestant": f"zeroxide kernel {name} (Rust)",
                "isa": measured.isa,
                "parameters": options.parameters,
                "threads": options.threads,
                "bytes_per_parameter": found[0]["bytes_per_param"],
                "seconds": step,
                "floor_seconds": floor,
                "share_of_floor": share,
            },
        )
        if name == "fp32":
            bench.emit(
                "cpu_adam", bench.goal("fp32 kernel, share of the streaming floor", share["median"], 0.9, at_most=False)
            )
    return floors


def report_contestants(options: argparse.Namespace, measured: Measured, floors: dict[str, float]) -> None:
    """Prints every contestant, and ours beside what each is compared with."""
    medians = {}
    for kind, values in measured.seconds.items():
        about = measured.about[kind]
        wall = bench.summary(values)
        medians[kind] = wall["median"]
        moved = about["bytes_per_parameter"] * about["parameters"]
        line = {
            "contestant": kind,
            "parameters": about["parameters"],
            "threads": options.threads,
            "bytes_per_parameter": about["bytes_per_parameter"],
            "seconds": wall,
            "cpu_seconds": bench.summary(measured.cpu[kind]),
            "gb_per_second": round(moved / wall["median"] / 1e9, 2),
        }
        # A floor is for one set of arrays: fp32 gradients or no master copy are other sets.
        same = {"zeroxide-bf16": "fp32", "zeroxide-split": "split"}.get(kind)
        if same is not None:
            line["share_of_floor"] = round(floors[same] / wall["median"], 4)
        bench.emit("cpu_adam", line)
    for ours, theirs in PAIRS:
        bench.emit("cpu_adam", {"ours": ours, "of": theirs, "step": round(medians[ours] / medians[theirs], 3)})


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    parser.add_argument("--parameters", type=int, default=100_000_000, help="parameters (default %(default)s)")
    parser.add_argument("--tensors", type=int, default=8, help="tensors that they are divided over")
    parser.add_argument("--steps", type=int, default=5, help="steps a contestant takes in a round")
    parser.set_defaults(rounds=5)
    options = parser.parse_args()

    bench.emit("machine", bench.machine())
    measured = measure(options)
    report_contestants(options, measured, report_kernels(options, measured))


if __name__ == "__main__":
    main()
