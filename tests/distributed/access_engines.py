"""Engines of several ranks, their values, and the same models on one process."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

import zeroxide

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import build

ENGINES = [
    {"zero_optimization": {"stage": 3}},
    {"zero_optimization": {"stage": 3}, "zeroxide": {"transport": "collective"}},
    {"zero_optimization": {"stage": 3, "offload_param": "nvme", "offload_optimizer": "nvme"}},
    {"zero_optimization": {"stage": 1}, "zeroxide": {"transport": "collective"}},
    {"zero_optimization": {"stage": 0}},
]


def config_of(base, dtype, folder):
    section = dict(base["zero_optimization"])
    for key, value in list(section.items()):
        if value == "nvme":
            section[key] = {"device": "nvme", "nvme_path": folder}
    own = {"threads": 1, **base.get("zeroxide", {})}
    return {
        "zero_optimization": section,
        "zeroxide": own,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 0,
        "steps_per_print": None,
    }


def start(model, base=ENGINES[0], dtype="bf16", **more):
    folder = tempfile.mkdtemp(dir=os.environ["JOB_FOLDER"])
    return zeroxide.initialize(model=model, config=config_of(base, dtype, folder), **more)[0]


def seeded(family="gpt", seed=0):
    torch.manual_seed(seed)
    return build(family)


def ids(seed, rows=2):
    return torch.randint(0, 61, (rows, 12), generator=torch.Generator().manual_seed(seed))


def values_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def full(engine):
    return {name: zeroxide.safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}


def live_if_frozen(model, dtype, values):
    """What an engine keeps of exact values: of frozen parameters the live weight alone, rounded half up to bf16."""
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    return {
        name: ((value.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
        if dtype == "bf16" and name in frozen
        else value
        for name, value in values.items()
    }


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(field)
