"""A job whose ranks train a model of experts of which few have tokens, as the cases in its arguments say.

Every rank prints a line "CASE {...}" for each: losses, and on rank 0 the units that its disk moved in each step; rank 0
saves the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from routed_models import batches, build, config_for

import zeroxide

STEPS = 5


def feed(rank: int) -> list[torch.Tensor]:
    """A micro-batch of one token for each step, another on each rank."""
    return batches(STEPS, seed=20 + rank)


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    config = config_for(folder, "skip", case["home"], transport=case["transport"], staging_bytes=1 << 20)
    if "stage" in case:
        config["zero_optimization"] = {"stage": case["stage"]}
    engine, *_ = zeroxide.initialize(model=build(case.get("recomputes", False)), config=config)
    losses, moved = [], []
    for number, ids in enumerate(feed(rank)):
        path = folder / f"{rank}.{number}.json"
        with engine.trace(path):
            loss = engine(ids)
            engine.backward(loss)
            losses.append(loss.item())
            engine.step()
            engine.finish_step()
        if rank == 0:
            events = json.loads(path.read_text())["traceEvents"]
            moves = [each for each in events if each["ph"] == "X" and each["name"] in ("read", "write")]
            moved.append(sorted({each["args"]["unit"] for each in moves}))
        dist.barrier()
    with torch.no_grad():
        losses.append(engine(torch.arange(4).view(1, -1) + 4 * rank).item())
    weights = engine.module_state_dict()
    if rank == 0:
        torch.save({name: value.clone() for name, value in weights.items()}, folder / f"{case['name']}.pt")
    engine.destroy()
    return {"name": case["name"], "losses": losses, "moved": moved}


def main() -> None:
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    zeroxide.init_distributed(verbose=False)
    for case in json.loads(path.read_text()):
        print("CASE " + json.dumps(run(case, path.parent)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
