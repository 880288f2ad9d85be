"""A training that begins with DeepSpeed, goes on with zeroxide and ends with DeepSpeed.

    python examples/deepspeed_there_and_back.py --steps 10 --out runs/there/deepspeed
    zeroxide convert runs/there/deepspeed runs/there/converted
    zeroxide run examples/deepspeed_there_and_back.py --load runs/there/converted --steps 20 --out runs/there/zeroxide
    zeroxide convert runs/there/zeroxide runs/there/universal --to universal
    python examples/deepspeed_there_and_back.py --load runs/there/universal --universal --steps 30 --out runs/there/end

The script is the same with both, and knows of neither what the other does: `python` has DeepSpeed installed here, and
under `zeroxide run` that name is zeroxide's. `zeroxide convert` also turns a universal checkpoint into zeroxide's, and
any of them into a model folder (docs/checkpoints.md).
"""

from __future__ import annotations

import argparse
import os
from pydoc_data.topics import topics

import deepspeed
import torch
from torch import nn
from torch.nn.functional import cross_entropy


def batch_of(text: torch.Tensor, step: int, rank: int, ranks: int) -> torch.Tensor:
    """This rank's pieces of the text at a step. They depend on the step alone, so that a run that goes on sees what it
    would have seen."""
    at = (step * ranks + rank) * 8 % (len(text) - 8)
    return text[at : at + 8]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--load", help="the folder of the checkpoint to go on from")
    parser.add_argument("--universal", action="store_true", help="which is a universal one: for DeepSpeed itself")
    parser.add_argument("--out", default="runs/there/deepspeed", help="the folder for the checkpoint at the end")
    parser.add_argument("--steps", type=int, default=10, help="counted from the very first")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--local_rank", type=int, default=0, help="DeepSpeed's launcher gives it")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(256, args.width),
        nn.Linear(args.width, 4 * args.width),
        nn.GELU(),
        nn.Linear(4 * args.width, args.width),
        nn.LayerNorm(args.width),
        nn.Linear(args.width, 256),
    )
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": args.stage},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3, "warmup_num_steps": 10}},
    }
    if args.universal:
        config["checkpoint"] = {"load_universal": True}
    if "RANK" not in os.environ:
        # One process that nobody has launched is the only rank.
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29500")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if args.load:
        path, _ = engine.load_checkpoint(args.load)
        if path is None:
            raise SystemExit(f"there is no checkpoint in {args.load}")
    text = torch.tensor(list("\n".join(topics[each] for each in sorted(topics)).encode()))
    text = text[: len(text) // 65 * 65].view(-1, 65)
    for step in range(engine.global_steps, args.steps):
        batch = batch_of(text, step, deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()).to(engine.device)
        loss = cross_entropy(engine(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        if deepspeed.comm.get_rank() == 0:
            print(f"{deepspeed.__version__} step {step + 1} loss {loss.item():.6f}", flush=True)
    engine.save_checkpoint(args.out)


if __name__ == "__main__":
    main()
