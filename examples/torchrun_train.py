"""A plain loop with zeroxide on one rank or many, on the bytes of a text.

    python examples/torchrun_train.py
    torchrun --nproc-per-node 2 examples/torchrun_train.py --offload nvme:/scratch
    srun python examples/torchrun_train.py        # see slurm.sh: SLURM's variables say which rank this is

Started again it goes on from its last checkpoint, at any number of ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import zeroxide


class Pieces(torch.utils.data.Dataset):
    """Pieces of a text, as numbers of bytes, with the byte that follows each."""

    def __init__(self, text: bytes, length: int) -> None:
        self.bytes, self.length = torch.frombuffer(bytearray(text), dtype=torch.uint8), length

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.length

    def __getitem__(self, at: int) -> torch.Tensor:
        return self.bytes[at * self.length : (at + 1) * self.length + 1].long()


class Model(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.layers = nn.GRU(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.layers(self.tokens(batch[:, :-1]))
        return cross_entropy(self.head(hidden).float().flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--offload", default="cpu", help='"none", "cpu" or "nvme:DIRECTORY"')
    parser.add_argument("--text", type=Path, help="a text file; Python's own documentation if none is given")
    parser.add_argument("--out", type=Path, default=Path("runs/torchrun_train"))
    args = parser.parse_args()
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": args.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}},
        "steps_per_print": 10,
    }
    with zeroxide.zero.Init(enabled=args.stage == 3):
        model = Model(args.width, args.layers)
    text = args.text.read_bytes() if args.text else "\n".join(topics.values()).encode()
    engine, _, loader, _ = zeroxide.initialize(
        model=model, training_data=Pieces(text, 64), config=config, offload=args.offload
    )
    engine.load_checkpoint(args.out)
    first = engine.global_steps
    while engine.global_steps < args.steps:
        for batch in loader:
            loss = engine(batch.to(engine.device))
            engine.backward(loss)
            engine.step()
            if engine.global_steps >= args.steps:
                break
    engine.save_checkpoint(args.out)
    engine.save_16bit_model(args.out / "model")
    if engine.global_rank == 0:
        print(f"{engine.world_size} ranks, steps {first} to {engine.global_steps}, loss {loss.item():.3f}")
    engine.destroy()


if __name__ == "__main__":
    main()
