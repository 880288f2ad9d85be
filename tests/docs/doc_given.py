"""What readers bring along: a model folder, data, a script of theirs, and what the snippets of a page take as there."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["GIVEN", "make_files"]

VOCABULARY = 50257

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
}


def make_files(folder: Path) -> None:
    """A GPT-2 of one layer at path/to/model, a config for DeepSpeed, and the directories that pages name."""
    from transformers import GPT2Config, GPT2LMHeadModel

    for name in ("mnt/fast", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "path/to/model")
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG, indent=2))


def batches(count: int = 2) -> list[Any]:
    import torch

    return list(torch.randint(0, VOCABULARY, (count, 2, 16), generator=torch.Generator().manual_seed(0)))


def engine_of(folder: Path, **more: Any) -> Any:
    """An engine that has made a step."""
    from transformers import AutoModelForCausalLM

    import zeroxide

    model = AutoModelForCausalLM.from_pretrained(folder / "path/to/model")
    engine, *_ = zeroxide.initialize(model=model, lr=1e-3, dtype="bf16", offload="cpu", **more)
    for ids in batches(1):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return engine


def drop_in(folder: Path) -> dict[str, Any]:
    (folder / "train.py").write_text(SCRIPT)
    return {}


SCRIPT = """
import sys

import deepspeed
import torch

assert deepspeed.__version__ == "0.19.8+zeroxide"
assert sys.argv[1:] in ([], ["--deepspeed", "ds_config.json"])
engine, *_ = deepspeed.initialize(model=torch.nn.Linear(8, 8), config="ds_config.json")
engine.backward(engine(torch.ones(2, 8).bfloat16()).float().square().mean())
engine.step()
engine.destroy()
"""
"""A script for DeepSpeed."""


def fsdp2(folder: Path) -> dict[str, Any]:
    """What torchrun tells a script."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {}


def deepspeed(folder: Path) -> dict[str, Any]:
    """A model whose forward gives the loss, and data for it."""
    import torch

    class Model(torch.nn.Linear):
        def forward(self, batch: Any) -> Any:
            return super().forward(batch).float().square().mean()

    return {"model": Model(8, 8), "data": list(torch.ones(4, 8, dtype=torch.bfloat16))}


def lightning(folder: Path) -> dict[str, Any]:
    import lightning.pytorch as pl
    import torch

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def training_step(self, batch: Any) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    loader = torch.utils.data.DataLoader(torch.ones(4, 8), batch_size=2)
    return {"Model": Model, "model": Model(), "loader": loader, "torch": torch}


def checkpoints(folder: Path) -> dict[str, Any]:
    return {"engine": engine_of(folder)}


def planning(folder: Path) -> dict[str, Any]:
    """A machine and a disk that were measured: measuring takes longer than a page may."""
    from zeroxide.cli.planning.measured import Disk, Machine, Measurements, cache_file, machine_key

    os.environ["ZEROXIDE_CACHE_DIR"] = str(folder / "cache")
    known = Machine(540 << 20, 740 << 20, 1e-5, {"fp32": 1e-9, "split": 1e-9}, {}, 1e11, 1e10)
    disks = {str(folder / "mnt/fast"): Disk(1e9, 1e9, 1e9)}
    Measurements(known, disks).save(cache_file(), machine_key(len(os.sched_getaffinity(0))))
    return {}


def report(folder: Path) -> dict[str, Any]:
    """An engine whose model returns its loss, and batches for it."""
    import torch

    import zeroxide

    class Loss(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).square().mean()

    engine, *_ = zeroxide.initialize(model=Loss(4, 2), lr=1e-3)
    return {"engine": engine, "two_batches": [torch.ones(1, 4), torch.zeros(1, 4)]}


GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "docs/checkpoints.md": checkpoints,
    "docs/drop-in.md": drop_in,
    "docs/from-deepspeed.md": deepspeed,
    "docs/from-fsdp2.md": fsdp2,
    "docs/lightning.md": lightning,
    "docs/planning.md": planning,
    "docs/report.md": report,
}
"""By page: makes the names that its snippets use and do not make."""
