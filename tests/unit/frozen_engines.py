"""Engines over models with frozen parts, in every mode."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from frozen_models import bytes_by_name

import zeroxide
from zeroxide import zero

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = [
    (0, "none", "fp32"),
    (1, "cpu", "bf16"),
    (2, "nvme", "fp16"),
    (2, "none", "fp32"),
    (3, "none", "bf16"),
    (3, "cpu", "fp32"),
    (3, "nvme", "fp32"),
    (3, "nvme", "bf16"),
    (3, "nvme", "fp16"),
]


@contextmanager
def started(model, tmp_path, stage=0, offload="none", precision="fp32", **more):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0,
        # Small tiles, so that parameters lie across them.
        "zeroxide": {"tile_bytes": 8192, "staging_bytes": 1 << 20, "threads": 1},
        **more,
    }
    if offload != "none":
        home = {"device": offload, "nvme_path": str(tmp_path)} if offload == "nvme" else {"device": offload}
        config["zero_optimization"]["offload_optimizer"] = home
        if stage == 3:
            config["zero_optimization"]["offload_param"] = home
    engine = zeroxide.initialize(model=model, config=config, dtype=precision)[0]
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine, steps=2):
    dtype = PRECISIONS[engine.resolved_config.precision.dtype]
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 8, dtype=dtype)))
        engine.step()


def shown(model):
    with zero.GatheredParameters(model.parameters()):
        return bytes_by_name(model.kept())


def differences(found, expected):
    return [name for name, value in expected.items() if found.get(name) != value]
