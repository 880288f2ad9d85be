"""`deepspeed.checkpointing`: activation checkpointing by torch's own function, which the engine follows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint

from zeroxide.errors import ConfigError
from zeroxide.integrations.deepspeed.logging import logger

__all__ = ["checkpoint", "configure", "is_configured", "reset"]

_configured = False


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, run again in backward instead of keeping what it saves."""
    call = functools.partial(function, **kwargs)  # torch's function has keywords of its own
    return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=False)


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Notes that checkpointing was configured. Raises ConfigError for what changes where activations are kept.

    `checkpoint_in_cpu` says what the config's `activation_checkpointing.cpu_checkpointing` does, and a line says so.
    """
    global _configured
    asked = {
        "mpu_": mpu_ is not None,
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
    }
    for name, value in asked.items():
        if value:
            raise ConfigError(f"deepspeed.checkpointing.configure: {name} is not built in zeroxide yet", path=name)
    if checkpoint_in_cpu:
        logger.info("activations wait in host memory where the config says activation_checkpointing.cpu_checkpointing")
    _configured = True


def is_configured() -> bool:
    """Whether `configure` has been called."""
    return _configured


def reset() -> None:
    """Nothing is kept from one step to the next."""
