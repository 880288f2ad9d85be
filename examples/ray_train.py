"""A plain loop with zeroxide in Ray Train's TorchTrainer: `python examples/ray_train.py --workers 2`.

Ray starts the workers and makes their process group, which the engine uses and leaves alone. Every rank saves its part
into one folder, so that a job goes on at another number of workers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import zeroxide


def batches(config: dict[str, Any], rank: int, ranks: int, first: int) -> Any:
    """This rank's pieces of the text from step `first` on."""
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    pieces = text[: len(text) // 65 * 65].view(-1, 65)
    for step in range(first, config["steps"]):
        at = (step * ranks + rank) * 8 % (len(pieces) - 8)
        yield pieces[at : at + 8]


def train(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(256, config["width"]), nn.Linear(config["width"], 256)
    model = nn.Sequential(embedding, nn.Linear(config["width"], config["width"]), nn.GELU(), head)
    # The GPU that Ray has given this worker: the engine computes where its model is.
    model = model.to(ray.train.torch.get_device())
    engine, *_ = zeroxide.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "gradient_clipping": 1.0},
        offload="cpu",
    )
    engine.load_checkpoint(config["out"])
    for batch in batches(config, engine.global_rank, engine.world_size, engine.global_steps):
        batch = batch.to(engine.device)
        loss = cross_entropy(engine(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        metrics = {"loss": loss.item(), "step": engine.global_steps, "ranks": engine.world_size}
        ray.train.report(metrics)
    engine.save_checkpoint(config["out"])
    # All ranks have saved into one folder: one of them hands it to Ray.
    kept = ray.train.Checkpoint.from_directory(config["out"]) if engine.global_rank == 0 else None
    ray.train.report(metrics, checkpoint=kept)
    engine.destroy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/ray_train"))
    args = parser.parse_args()
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"steps": args.steps, "width": args.width, "out": str(args.out.absolute() / "checkpoints")},
        scaling_config=ray.train.ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=ray.train.RunConfig(storage_path=str(args.out.absolute() / "ray")),
    )
    found = trainer.fit()
    print({name: found.metrics[name] for name in ("ranks", "step", "loss")})


if __name__ == "__main__":
    main()
