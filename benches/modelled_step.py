"""How long a GPU would stand still in a step, by a model: zeroxide's order of operations beside DeepSpeed's.

    python benches/modelled_step.py

Llama of 7 B parameters, micro-batch 8 x 2048 with every layer checkpointed, one card of 24 GiB, state in host memory.
No GPU is used. What zeroxide submits is recorded on the simulated device with a small model of the same proportions
(`timeline/engine_order.py`); what DeepSpeed 0.19.8 submits is written down from its source
(`timeline/deepspeed_order.py`). Both are replayed with the same rates (`timeline/model.py`). The model's stream stands
for the host (`for_host`) as long as it would if copies took no time, and for copies (`for_copies`) beyond that, in a
step after the first. What the host takes to submit is left out on both sides.

Compared are configs that have weights at the same home; `card_bytes` is what weights, gradients under way, buckets and
activations would take of the card. The goal is judged beside DeepSpeed's settings as they are if only the offload is
asked for, and the ratio to the least of its settings for this home is printed, too.

Rates: an RTX 4090's bf16 products with fp32 sums, 165.2 TFLOP/s (NVIDIA Ada GPU architecture whitepaper, 2022, appendix
A); PCIe 4.0 x16, 16 GT/s with 128b/130b, 31.5 GB/s each way (PCI Express Base Specification 4.0); host memory of a
desktop, two channels of DDR5-4800, 76.8 GB/s, and of a server, eight of DDR4-3200, 204.8 GB/s (JEDEC JESD79-5 and
JESD79-4: transfers a second times 8 bytes times channels). They are peaks. `--efficiency` lowers that of compute.

`--check` compares the model with the simulated device: copies of a known duration, the host's own times taken from a
run without it, and the end that both come to.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import side_by_side as bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from simulated import device
from timeline import engine_order, llama
from timeline.deepspeed_order import Order, Settings
from timeline.model import Rates, Split, last_step
from timeline.pacing import check

HOSTS = {"desktop": 76.8e9, "server": 204.8e9}
CARD = Rates(flops=165.2e12, link=31.5e9, host_memory=HOSTS["server"])
CARD_BYTES = 24 << 30
GOAL = 0.25
STEPS = 2

THEIRS: dict[str, dict[str, Settings]] = {
    "host": {
        "stage 3, offload_param": Settings(3, weights_on_device=False, overlap=True),
        # Buckets as Hugging Face's Trainer sets them where a config says "auto".
        "stage 3, offload_param, auto buckets": Settings(3, False, True, llama.WIDTH**2, 0.9 * llama.WIDTH**2),
    },
    "card": {
        "stage 2": Settings(2, weights_on_device=True, overlap=False),
        "stage 2, overlap_comm": Settings(2, weights_on_device=True, overlap=True),
        "stage 3": Settings(3, weights_on_device=True, overlap=True),
    },
}
"""By the home of weights, the settings as they are by themselves first."""
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "host": {"stage 3, offload_param": {"stage": 3, "offload_param": {"device": "cpu"}}},
    "card": {"stage 3": {"stage": 3}, "stage 2": {"stage": 2}},
}


def card_bytes(costs: llama.Costs, home: str, beside: float, *, kept: bool = False) -> int:
    """Of weights, activations and what else there is."""
    return round((2 * costs.total if home == "card" else 0) + beside + llama.activation_bytes(kept=kept))


def our_card_bytes(costs: llama.Costs, home: str, *, kept: bool) -> int:
    """Weights of three layers (in use, ahead and just released) where they come and go, a layer's gradients."""
    layer = 2 * sum(costs.numel(name) for name in costs.shapes if "layers.0." in name)
    return card_bytes(costs, home, (4 if home == "host" else 1) * layer, kept=kept)


def describe(split: Split) -> dict[str, float]:
    """A step in milliseconds."""
    parts = ("step", "compute", "for_host", "for_copies")
    return {f"{part}_ms": round(1e3 * getattr(split, part), 1) for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--efficiency", type=float, default=1.0, help="share of its peak that compute reaches")
    parser.add_argument("--micro-batches", type=int, default=1, help="of zeroxide's own steps, shown beside nothing")
    parser.add_argument("--check", action="store_true", help="only compare the model with the simulated device")
    options = parser.parse_args()
    device.load()
    if options.check:
        for delay, micro_batches in ((0.02, 1), (0.1, 1), (0.02, 2)):
            bench.emit("model_check", check(delay, micro_batches))
        return
    costs = llama.Costs(llama.shapes())
    theirs = {
        home: {name: Order(costs, each).steps(STEPS) for name, each in sides.items()} for home, sides in THEIRS.items()
    }
    ours = {
        (home, f"{name}{', cpu_checkpointing' if kept else ''}", kept): engine_order.record(
            zero, STEPS, keep=kept, micro_batches=options.micro_batches
        ).record
        for home, sides in OURS.items()
        for name, zero in sides.items()
        for kept in ((False, True) if zero["stage"] == 3 else (False,))
    }
    for host, memory in HOSTS.items():
        rates = replace(CARD, host_memory=memory, flops=CARD.flops * options.efficiency)
        found: dict[str, dict[str, Split]] = {}
        for home, records in theirs.items():
            found[home] = {name: last_step(each, rates) for name, each in records.items()}
            for name, split in found[home].items():
                size = card_bytes(costs, home, THEIRS[home][name].card_bytes)
                line = {"who": "deepspeed 0.19.8", "weights": home, "config": name, "host": host, **describe(split)}
                bench.emit("modelled_step", {**line, "card_bytes": size, "fits": size <= CARD_BYTES})
        for (home, name, kept), each in ours.items():
            split, size = last_step(each, rates), our_card_bytes(costs, home, kept=kept)
            line = {"who": "zeroxide", "weights": home, "config": name, "host": host, **describe(split)}
            line |= {"card_bytes": size, "fits": size <= CARD_BYTES}
            if options.micro_batches == 1:
                peers = list(found[home].values())
                ratio = split.for_copies / peers[0].for_copies
                line |= {
                    "for_copies_ratio": round(ratio, 3),
                    "for_copies_ratio_least": round(split.for_copies / min(peer.for_copies for peer in peers), 3),
                    "exposed_ratio": round(split.exposed / peers[0].exposed, 3),
                    "exposed_ratio_least": round(split.exposed / min(peer.exposed for peer in peers), 3),
                    "step_ratio_least": round(split.step / min(peer.step for peer in peers), 3),
                    "goal": GOAL,
                    "reached": ratio <= GOAL,
                }
            bench.emit("modelled_step", line)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
