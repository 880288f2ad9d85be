"""Constants that scripts and libraries read of `deepspeed`."""

from __future__ import annotations

from zeroxide.integrations.deepspeed.surface import PUBLIC

__all__ = [
    "ENVIRONMENT_FILE",
    "LR_RANGE_TEST",
    "MAJOR",
    "MINOR",
    "ONE_CYCLE",
    "PATCH",
    "VALID_LR_SCHEDULES",
    "WARMUP_COSINE_LR",
    "WARMUP_DECAY_LR",
    "WARMUP_LR",
]

MAJOR, MINOR, PATCH = (int(part) for part in PUBLIC.split("."))

WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
LR_RANGE_TEST, ONE_CYCLE = "LRRangeTest", "OneCycle"
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]
"""Names that `scheduler.type` may have."""

ENVIRONMENT_FILE = ".deepspeed_env"
"""What DeepSpeed's launcher calls the file of variables for all hosts; accelerate writes it for that launcher."""
