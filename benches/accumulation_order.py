"""Micro-batches of a step layer by layer beside one after the other: what is read for weights, and how long a step is.

    python benches/accumulation_order.py --rounds 5

GPT-2 124 M in bf16, clipping at 1.0, eight micro-batches of 1 x 128 a step, weights on disk. Steps are timed with
optimizer state on disk as well; both processes stay alive and make a step each in turn, and two steps of each warm up.
What is read for weights alone is what is read in all when the state is in host memory. "processor" is what all threads
worked, in seconds, which other programs on the machine change least. Losses are compared: they must be the same in
every step.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from typing import Any

import side_by_side as bench

ORDERS = ("batches", "layers")
WARM_UP = 2


def measure(state: str, rounds: int, options: Any) -> dict[str, list[dict[str, Any]]]:
    """Steps of both orders, interleaved, with optimizer state at home in `state`."""
    found: dict[str, list[dict[str, Any]]] = {order: [] for order in ORDERS}
    contestants = {}
    try:
        for order in ORDERS:
            directory = options.directory / "accumulation-order" / order
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            spec = {
                "model": options.model,
                "order": order,
                "micro_batches": options.micro_batches,
                "rows": options.batch,
                "columns": options.sequence,
                "state": state,
                "directory": str(directory),
                "threads": options.threads,
            }
            contestants[order] = bench.Contestant(
                bench.zeroxide_side(),
                "accumulation_order.py",
                spec,
                threads=options.threads,
                environment={"OMP_WAIT_POLICY": "passive"} if options.passive else {},
                prefix=options.prefix,
            )
        for number in range(WARM_UP + rounds):
            for order, contestant in contestants.items():
                bench.note(f"state in {state}, step {number + 1} of {WARM_UP + rounds}: {order}")
                found[order].append(contestant.round())
    finally:
        for contestant in contestants.values():
            contestant.close()
        shutil.rmtree(options.directory / "accumulation-order", ignore_errors=True)
    return found


def figures(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the measured steps of one order."""
    measured = steps[WARM_UP:]
    result: dict[str, Any] = {
        name: bench.summary(step[name] for step in measured)
        for name in ("seconds", "processor", "forward", "backward", "step")
    }
    for name in ("read_bytes", "write_bytes"):
        result[f"{name}_per_parameter"] = round(statistics.median(step[name] for step in measured), 2)
    result["peak_gb"] = round(max(step["peak"] for step in steps) / 1e9, 2)
    return result


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--model", choices=("tiny", "124m", "355m"), default="124m")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--sequence", type=int, default=128, help="tokens a row")
    parser.add_argument(
        "--passive",
        action="store_true",
        help="compute threads that wait sleep at once, so that other programs on the machine disturb less",
    )
    options = parser.parse_args()

    bench.emit("machine", bench.machine(options.directory))
    same = True
    results: dict[str, dict[str, Any]] = {}
    for state, rounds in (("cpu", 1), ("nvme", options.rounds)):
        found = measure(state, rounds, options)
        same &= [step["loss"] for step in found["batches"]] == [step["loss"] for step in found["layers"]]
        results = {order: figures(steps) for order, steps in found.items()}
        for order, result in results.items():
            setting = {"model": options.model, "micro_batches": options.micro_batches, "state": state, "order": order}
            bench.emit("accumulation_order", {**setting, **result})
        if state == "cpu":
            read = results["layers"]["read_bytes_per_parameter"]
            bench.emit(
                "accumulation_order",
                bench.goal(f"{options.model}: bytes read for weights, layer by layer", read, 4.2, at_most=True),
            )
    share = results["layers"]["seconds"]["median"] / results["batches"]["seconds"]["median"]
    bench.emit(
        "accumulation_order",
        bench.goal(f"{options.model}: a step of one micro-batch after the other", share, 0.65, at_most=True),
    )
    bench.emit("accumulation_order", {"losses": "the same" if same else "DIFFERENT"})
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
