"""From what the user wrote to what zeroxide reads: the document and the shortcuts, section by section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zeroxide.config.check import validate
from zeroxide.config.document import Document
from zeroxide.config.given import Given
from zeroxide.config.resolved import Config
from zeroxide.config.sections import (
    activation_checkpointing,
    aio,
    batch,
    checkpoint,
    gradients,
    mesh,
    optimizer,
    precision,
    report,
    scheduler,
    zero,
    zeroxide,
)
from zeroxide.config.sections.precision import Dtype
from zeroxide.config.shortcuts import Shortcuts

__all__ = ["resolve"]


def resolve(
    data: Mapping[str, Any],
    keywords: Mapping[str, Any],
    *,
    world_size: int,
    origin: str,
    own_dtype: Callable[[], Dtype] | None = None,
) -> Config:
    """Return the config that `data` (a parsed document) and `keywords` (shortcuts) come to on `world_size` processes.

    `own_dtype` is as for `load`. Raises `ConfigError`.
    """
    no_effect: list[tuple[str, str]] = []
    document = validate(Document, data, origin=origin, no_effect=no_effect)
    shortcuts = validate(Shortcuts, keywords, origin="keyword arguments", no_effect=[])
    given = Given(shortcuts, origin, Document, world_size, no_effect)
    own = document.zeroxide or zeroxide.ZeroxideSection()
    clipping = gradients.resolve(document, given)
    sharding = zero.resolve(document.zero_optimization, clipping, given)
    return Config(
        precision=precision.resolve(document, own.format, own_dtype, given),
        batch=batch.resolve(document, given),
        gradients=clipping,
        zero=sharding,
        mesh=mesh.resolve(own.mesh, document.zero_optimization, sharding.stage, given),
        optimizer=optimizer.resolve(document.optimizer, given),
        scheduler=scheduler.resolve(document.scheduler, given),
        aio=aio.resolve(document.aio),
        activation_checkpointing=activation_checkpointing.resolve(document.activation_checkpointing),
        zeroxide=zeroxide.resolve(own, given),
        checkpoint=checkpoint.resolve(document.checkpoint, own),
        report=report.resolve(document),
        no_effect=no_effect,
        source=dict(data),
    )
