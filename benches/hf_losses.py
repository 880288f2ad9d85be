"""Losses of Hugging Face's Trainer with a DeepSpeed config, unchanged, under DeepSpeed, under zeroxide, and alone.

    python benches/hf_losses.py --steps 50

GPT-2, batch 1 x 128, bf16, state in host memory, ZeRO-2 and 3; Trainer alone in fp32 and in bf16 by autocast. Everybody
begins from the same fp32 weights and has the same batches.

Whoever computes in bf16 rounds weights, activations and gradients to 8 significant bits, a relative error of at most
2^-8 each (Higham, Accuracy and Stability of Numerical Algorithms, section 2.1), in another order than the others. What
training makes of that in 50 steps has no bound that is of use: where the loss falls fast, runs that were rounded in
another way are soon some percent apart. So the bound is measured: how far the others that compute in bf16 are from
fp32, at the step where they are furthest. zeroxide may be as far.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import hf_trainer
import side_by_side as bench


def contestants(options: argparse.Namespace) -> dict[str, tuple[bench.Side, dict[str, Any], dict[str, str]]]:
    """Who runs, by name: the interpreter, what the worker is told, and its environment."""
    ours, peers = bench.zeroxide_side(), bench.peers_side()
    keep = bench.ALLOCATORS["keep"]
    alone = {"offload": "none", "settings": "defaults", "how": "alone", "stage": 0}
    found: dict[str, tuple[bench.Side, dict[str, Any], dict[str, str]]] = {
        "trainer alone fp32": (ours, alone | {"bf16": False}, keep),
        "trainer alone bf16": (ours, alone, keep),
    }
    for stage in options.stages:
        given = {"offload": "cpu", "settings": "defaults", "how": "trainer", "stage": stage}
        found[f"deepspeed stage {stage}"] = peers, given, keep
        found[f"zeroxide stage {stage}"] = ours, given, keep | {"ZEROXIDE_AS_DEEPSPEED": "1"}
    return found


def furthest(one: list[float], other: list[float]) -> float:
    """The largest difference of two runs' losses, relative to the second's."""
    assert len(one) == len(other), "both made the same steps"
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--model", default="124m", help="size (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps of a run (default %(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="ZeRO stages (default 2 and 3)")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    weights = hf_trainer.saved_weights(bench.zeroxide_side(), options.model, options.directory)
    losses = {}
    for name, (side, given, environment) in contestants(options).items():
        losses[name] = hf_trainer.run(side, given, environment, weights, options)["losses"]
        bench.emit("hf_losses", {"contestant": name, "losses": losses[name]})
    report(losses, options.stages)


def report(losses: dict[str, list[float]], stages: list[int]) -> None:
    """Prints how far everybody is from fp32, and zeroxide beside the furthest of the others."""
    exact = losses["trainer alone fp32"]
    for name in losses:
        bench.emit("hf_losses", {"from fp32": name, "furthest": round(furthest(losses[name], exact), 4)})
    for stage in stages:
        bound = furthest(losses[f"deepspeed stage {stage}"], exact)
        got = furthest(losses[f"zeroxide stage {stage}"], exact)
        bench.emit("hf_losses", bench.goal(f"stage {stage}: from fp32, of DeepSpeed's", got / bound, 1.0, at_most=True))


if __name__ == "__main__":
    sys.exit(main())
