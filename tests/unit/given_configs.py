"""What the tests of the config share."""

from __future__ import annotations

import pytest

from zeroxide.config import load
from zeroxide.errors import ConfigError

GIB = 1 << 30
ADAM = {"optimizer": {"type": "Adam", "params": {}}}
FP16 = {"fp16": {"enabled": True}}
BF16 = {"bf16": {"enabled": True}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
DECAY = {"type": "WarmupDecayLR", "params": {"total_num_steps": 20}}
COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": 20}}
RANGE_TEST = {"type": "LRRangeTest", "params": {"last_batch_iteration": -1}}
ONE_CYCLE = {"type": "OneCycle", "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}}


def nested(path: str, value: object) -> dict:
    """`a.b = value` as a document."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merged(left: dict, right: dict) -> dict:
    result = dict(left)
    for key, value in right.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def complaint(config: object = None, **shortcuts: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(config, **shortcuts)
    assert "\n" not in str(caught.value)
    return caught.value
