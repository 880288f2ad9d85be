"""Losses of Hugging Face's Trainer with a DeepSpeed config, unchanged, under DeepSpeed, under zeroxide, and alone.

    python benches/hf_losses.py --steps 50

GPT-2, batch 1 x 128, bf16, state in host memory, ZeRO-2 and 3; Trainer alone in fp32 and in bf16 by autocast. Everybody
begins from the same fp32 weights and has the same batches.

Whoever computes in bf16 rounds weights, activations and gradients to 8 significant bits, a relative error of at most
u = 2^-8 each (Higham, Accuracy and Stability of Numerical Algorithms, section 2.1), in another order than the others.
The loss is a mean over logits that carry such errors, of either sign: two such runs are said to agree where their
losses are within u of one another at every step, and neither is nearer to fp32 than u by luck alone, so that both are
compared with fp32 as well.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import hf_trainer
import side_by_side as bench

UNIT_ROUNDOFF = 2.0**-8
"""Of bf16, to nearest."""


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
    for stage in options.stages:
        for other in (f"deepspeed stage {stage}", "trainer alone bf16", "trainer alone fp32"):
            got = furthest(losses[f"zeroxide stage {stage}"], losses[other])
            bench.emit("hf_losses", bench.goal(f"stage {stage}, from {other}", got, UNIT_ROUNDOFF, at_most=True))
        got = furthest(losses[f"deepspeed stage {stage}"], losses["trainer alone fp32"])
        bench.emit("hf_losses", {"deepspeed": f"stage {stage}, from trainer alone fp32", "got": round(got, 4)})


if __name__ == "__main__":
    sys.exit(main())
