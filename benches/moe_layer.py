"""Forward and backward of the experts of one layer, against transformers' own, on the CPU.

A Mixtral block with 64 experts and 4,096 tokens: its own gate, and its experts by each way that transformers has for a
CPU, and by `zeroxide.moe.fused`. They take turns within each round, in an order that turns too; figures are medians
over rounds, and their ratios. The same weights, tokens and gradients are checked before.

    python benches/moe_layer.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from zeroxide.moe.fused import gated_experts

SIDES = ("zeroxide", "grouped_mm", "eager")
"""`grouped_mm` is what transformers chooses by itself."""


def experts_forward(module, tokens, experts, weights):
    """What transformers calls in place of the experts' own forward."""
    return gated_experts(tokens, experts, weights, module.gate_up_proj, module.down_proj, module.act_fn)


def make(args: argparse.Namespace) -> MixtralSparseMoeBlock:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=args.hidden,
        intermediate_size=args.features,
        num_local_experts=args.experts,
        num_experts_per_tok=args.k,
    )
    block = MixtralSparseMoeBlock(config)
    for param in block.parameters():
        torch.nn.init.normal_(param, std=0.02)
    return block.to(getattr(torch, args.dtype))


def run(block: MixtralSparseMoeBlock, side: str, given: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds of a forward and a backward, and what the block made."""
    own = type(block.experts).forward
    block.experts.config._experts_implementation = "eager" if side == "zeroxide" else side
    if side == "zeroxide":
        block.experts.forward = experts_forward.__get__(block.experts)
    else:
        block.experts.forward = own.__get__(block.experts)
    for param in block.parameters():
        param.grad = None
    given.grad = None
    start = time.perf_counter()
    made = block(given)
    made.backward(torch.ones_like(made))
    return time.perf_counter() - start, made.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    block = make(args)
    given = torch.randn(1, args.tokens, args.hidden).to(getattr(torch, args.dtype)).requires_grad_()
    seen = {}
    for side in SIDES:
        made = run(block, side, given)[1]
        seen[side] = made, given.grad.clone(), *(param.grad.clone() for param in block.parameters())
    most = 1e-4 if args.dtype == "float32" else 5e-2
    for side in SIDES[1:]:
        for ours, theirs in zip(seen["zeroxide"], seen[side], strict=True):
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < most, side
    del seen
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(args.rounds):
        for at in range(len(SIDES)):
            side = SIDES[(turn + at) % len(SIDES)]
            times[side].append(run(block, side, given)[0])
    medians = {side: statistics.median(each) for side, each in times.items()}
    print(
        json.dumps(
            {
                "benchmark": "moe_layer",
                **vars(args),
                "seconds": {side: round(each, 4) for side, each in medians.items()},
                "ratio": {side: round(medians["zeroxide"] / medians[side], 3) for side in SIDES[1:]},
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
