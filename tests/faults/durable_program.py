"""A durable run, killed and started again: `durable_program.py FOLDER STEPS EVERY WEIGHTS STATE DTYPE GRADIENTS`.

It goes on from its last commit, saves a checkpoint after every fourth step, and in the end says what it has come to:
a digest of every exact weight and of all optimizer state, of buffers, schedule and random numbers. What it trains on
comes from the random number generators, and the model has dropout and batch statistics: what is not brought back shows.
Before each save it says a digest of what is saved. With `--load CHECKPOINTS` it trains nothing: it says the digest of
the checkpoint that `latest` names there, or that there is none.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import zeroxide
from zeroxide.device.placement import spec

WIDTH = 24


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.seen = nn.BatchNorm1d(WIDTH, affine=False)
        self.head = nn.Linear(WIDTH, 40)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.frozen(self.embed(x))
        for block in self.blocks:
            h = h + nn.functional.dropout(torch.tanh(block(h)), 0.2, self.training)
        h = self.seen(h.flatten(0, 1).float()).to(h.dtype)
        return nn.functional.cross_entropy(self.head(h).float(), x.roll(1).flatten())


def config_of(folder: Path, every: int, weights: str, state: str, dtype: str, gradients: str) -> dict[str, object]:
    def home(kind: str) -> dict[str, str]:
        return {"device": kind, **({"nvme_path": str(folder)} if kind == "nvme" else {})}

    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 15, "warmup_max_lr": 1e-2}},
        "zero_optimization": {"stage": 3, "offload_optimizer": home(state), "offload_param": home(weights)},
        "zeroxide": {
            "durable_every": every,
            "gradients": gradients,
            "threads": 1,
            "trim_libraries": False,
            "device": "cpu",
        },
        "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 4, "loss_scale_window": 5},
        "bf16": {"enabled": dtype == "bf16"},
    }


def saved_digest(engine: zeroxide.Engine) -> str:
    """All that a checkpoint holds, of this rank."""
    core, found = engine.parts.core(), hashlib.blake2b(digest_size=12)
    for unit in engine.parts.units:
        for param, start, count in core.pieces(unit.index):
            for part in ("weights", *unit.states) if unit.trainable[param] else ():
                values = torch.empty(count)
                core.read_param(unit.index, param, part, start, spec(values))
                found.update(values.numpy().tobytes())
            found.update(str(core.updates(unit.index, param)).encode())
    for buffer in engine.module.buffers():
        found.update(buffer.detach().contiguous().numpy().tobytes())
    engine_state = (engine.get_lr(), engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.client_state)
    found.update(json.dumps([*engine_state, engine.parts.scaler.state_dict()]).encode())
    return found.hexdigest()


def digest(engine: zeroxide.Engine) -> str:
    """All that training depends on, of this rank: random numbers, too, which are drawn for it."""
    found = hashlib.blake2b(saved_digest(engine).encode(), digest_size=12)
    found.update(json.dumps([torch.rand(3).tolist(), random.random(), float(np.random.rand())]).encode())
    return found.hexdigest()


def main(folder: str, steps: str, every: str, *kinds: str) -> None:
    *kinds, checkpoints = kinds if "--load" in kinds else (*kinds, "")
    torch.set_num_threads(1)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    root = Path(folder)
    engine, *_ = zeroxide.initialize(model=Model(), config=config_of(root, int(every), *kinds[:4]))
    print("ready", flush=True)
    if checkpoints:
        path, state = engine.load_checkpoint(checkpoints)
        engine.client_state.update(state or {})
        print("loaded", f"step {engine.global_steps} is {saved_digest(engine)}" if path else "none", flush=True)
        engine.destroy()
        return
    print("resumed", engine.resume(), flush=True)
    while engine.global_steps < int(steps):
        for _ in range(2):
            x = torch.randint(0, 40, (2, random.randrange(4, 9)))
            engine.client_state["seen"] = engine.client_state.get("seen", 0) + int(np.random.randint(1, 5))
            engine.backward(engine(x))
            engine.step()
        print("step", engine.global_steps, flush=True)
        if engine.global_steps % 4 == 0:
            print(f"saves step {engine.global_steps} is {saved_digest(engine)}", flush=True)
            engine.save_checkpoint(root / "checkpoints", client_state=engine.client_state)
    engine.wait_for_checkpoint()
    print("done", digest(engine), flush=True)
    engine.destroy()


main(*sys.argv[1:])
