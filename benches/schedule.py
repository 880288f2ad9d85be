"""What a step of a large job exchanges and keeps, rank by rank, found without starting it.

    python benches/schedule.py

Llama-like models of 7 B and 70 B parameters on the meta device, ZeRO-3 over 8 to 1,024 ranks of torch's fake process
group, collectives as transport. For each, one line: collectives and bytes that leave a rank in a step, beside the
formula; and the payload of a rank by bucket, beside the formula. A figure that the formula does not give is a surprise.

Formulas, for P parameters, padding included (a unit is a multiple of 2,048 elements a rank), R of which lie at the root
and are gathered once, N ranks, 2 bytes a weight and gradient, 10 bytes of optimizer state:

    sent = (2 R + 3 (P - R)) * 2 * (N - 1) / N, less what is still in memory at the turn from forward to backward
    state = 10 P / N
    gradients = 2 P / N + R and three of the largest other unit on their way out + (N - 1) / N of the largest coming in
    weights = 2 P / N + what is gathered
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import side_by_side as bench
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from zeroxide import distributed as ranks_of
from zeroxide.config import load
from zeroxide.plan.plan import make_plan
from zeroxide.plan.schedule import collectives

MODELS = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
CONFIG = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "zeroxide": {"transport": "collective", "unit_bytes": "4GiB"},
}
ALLOWED = 0.001
"""Share by which a figure may differ from the formula: rounding to whole elements."""


def line(name: str, model: torch.nn.Module, world: int) -> dict[str, object]:
    """The figures of one model over `world` ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        ranks = ranks_of.start()
        plan = make_plan(model, load(CONFIG, world_size=world), threads=1, resident=0, ranks=ranks)
    finally:
        dist.destroy_process_group()
    parameters = sum(unit.numel for unit in plan.units)
    padded = [elements for _, elements in plan.numbers.padded]
    total = sum(padded)
    root = sum(size for size, unit in zip(padded, plan.units, strict=True) if unit.held_through_backward)
    steps = collectives(plan)
    sent = sum(each.sent for each in steps)
    block = max(size for size, unit in zip(padded, plan.units, strict=True) if not unit.held_through_backward)
    turned = (
        sum(1 for each in steps if each.kind == "all-gather" and each.phase == "forward") * 2
        - 1
        - sum(1 for each in steps if each.kind == "all-gather")
    )
    expected = (2 * root + 3 * (total - root) - turned * block) * 2 * (world - 1) / world
    buckets = {name: round(size / 1e9, 3) for name, size in plan.buckets.items() if size}
    kept = plan.buckets["optimizer"] + plan.buckets["weights"] + plan.buckets["gradients"]
    on_its_way = (root + 3 * block) * 2 + max(root, block) * 2 * (world - 1) / world
    state = 14 * total / world + on_its_way
    surprises = [
        what
        for what, got, formula in (("sent", sent, expected), ("kept", kept, state))
        if abs(got - formula) > ALLOWED * formula
    ]
    return {
        "model": name,
        "parameters": parameters,
        "padding_share": round(total / parameters - 1, 5),
        "ranks": world,
        "collectives": dict(Counter(f"{each.phase} {each.kind}" for each in steps)),
        "sent_gb": round(sent / 1e9, 4),
        "formula_gb": round(expected / 1e9, 4),
        "sent_of_weights": round(sent / (2 * parameters * (world - 1) / world), 4),
        "payload_gb_by_bucket": buckets,
        "kept_gb": round(kept / 1e9, 4),
        "kept_formula_gb": round(state / 1e9, 4),
        "surprises": surprises,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", action="append", type=int, help="ranks (default 8 to 1024 by powers of two)")
    options = parser.parse_args()
    surprised = False
    for name, size in MODELS.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=32000, tie_word_embeddings=False))
        for world in options.world or [8, 16, 32, 64, 128, 256, 512, 1024]:
            found = line(name, model, world)
            surprised = surprised or bool(found["surprises"])
            bench.emit("schedule", found)
    if surprised:
        sys.exit("benches: error: a figure is not what the formula gives")


if __name__ == "__main__":
    main()
