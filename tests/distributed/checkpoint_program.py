"""What each rank of the checkpoint tests runs: `save`, `resume` or `copy`, with a stage, an offload mode and more."""

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

import zeroxide


class Model(nn.Module):
    """Tied embeddings, repeated blocks of odd sizes, one of them frozen, and a buffer that forward changes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 137), nn.Tanh(), nn.Linear(137, 64)) for _ in range(3))
        self.blocks[1].requires_grad_(False)
        self.seen = nn.BatchNorm1d(64, affine=False)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        h = self.seen(h.flatten(0, 1).float()).to(h.dtype)
        return nn.functional.cross_entropy(self.head(h).float(), x.roll(1).flatten())


def build(stage, offload, seed, background=False, groups=None):
    torch.manual_seed(seed)
    more = {} if offload == "none" else {"offload" if stage == 3 else "offload_optimizer": offload}
    config = {
        "zero_optimization": {"stage": stage},
        "data_types": {"buffer_dtype": "fp32"},
        "zeroxide": {"threads": 1, "checkpoint_background": background, "mesh": {"dp_shard": groups}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 1e-2}},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
    }
    return zeroxide.initialize(model=Model(), config=config, lr=1e-2, weight_decay=0.1, dtype="bf16", **more)[0]


def train(engine, first, last):
    losses = []
    for _ in range(first, last):
        # Different batches on the ranks, drawn from what a checkpoint keeps for each.
        x = torch.randint(0, 50, (2, 8))
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def main(act, folder, stage, offload, *more):
    torch.set_num_threads(1)
    how = {"background": "background" in more, "groups": 2 if "groups of 2" in more else None}
    engine = build(int(stage), offload, seed=7 if act == "copy" else 0, **how)
    rank = engine.ranks.rank
    if act == "save":
        torch.manual_seed(100 + rank)
        train(engine, 0, 2)
        engine.save_checkpoint(folder, client_state={"data": 2})
        losses = train(engine, 2, 4)
        engine.wait_for_checkpoint()
        other = build(int(stage), offload, seed=7, groups=how["groups"])
        torch.manual_seed(5)
        train(other, 0, 1)
        _, state = other.load_checkpoint(folder)
        assert state == {"data": 2}
        assert train(other, 2, 4) == losses, "the same bits"
        for each, name in ((engine, "one"), (other, "two")):
            file = each.save_16bit_model(Path(folder) / name)
            print(rank, "model", hashlib.sha256(file.read_bytes()).hexdigest(), flush=True)
        other.destroy()
    elif act == "resume":
        engine.load_checkpoint(folder, "global_step2")
        losses = train(engine, 2, 4)
        file = engine.save_16bit_model(Path(folder) / f"resumed {' '.join(more)}")
        print("END", rank, losses, hashlib.sha256(file.read_bytes()).hexdigest(), flush=True)
    else:
        # Loaded at another world size and saved again, nothing has changed.
        engine.load_checkpoint(folder, "global_step2")
        engine.save_checkpoint(f"{folder}/again", "tag")
        engine.wait_for_checkpoint()
    engine.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
