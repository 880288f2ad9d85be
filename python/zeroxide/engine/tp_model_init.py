"""`zeroxide.tp_model_init`: says of a model how its matrices are to be cut; `initialize` cuts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.config.source import read
from zeroxide.errors import ConfigError
from zeroxide.precision.policy import torch_dtype

__all__ = ["check_dtype", "tp_model_init", "with_asked"]

_ASKED = "_tp_model_init"
_SECTION = "tensor_parallel"


@dataclass(frozen=True)
class _Asked:
    """What a model was said to be."""

    size: int
    dtype: torch.dtype | None
    section: Mapping[str, Any] = field(default_factory=dict)


def tp_model_init(model: nn.Module, tp_size: int, dtype: Any, config: Any = None, **kwargs: Any) -> nn.Module:
    """Notes that `model` is to be cut over `tp_size` ranks, and returns it as it is; the signature of
    `deepspeed.tp_model_init`.

    dtype: what it will train in; None for what the config says.
    config: a section `tensor_parallel`, or a document with one; the config of `initialize` comes before it.

    Raises ConfigError for a size that is none, and for keyword arguments: groups are the mesh's.
    """
    if kwargs:
        name = next(iter(kwargs))
        raise ConfigError(f"tp_model_init: {name}: groups of one's own are not built; the mesh makes them", path=name)
    if type(tp_size) is not int or tp_size < 1:
        raise ConfigError(f"tp_model_init: tp_size: expected an integer from 1, got {tp_size!r}", path="tp_size")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"tp_model_init: dtype: expected a dtype of torch or None, got {dtype!r}", path="dtype")
    said = {} if config is None else read(config).data
    section = said.get(_SECTION, said if _SECTION not in said else {})
    model.__dict__[_ASKED] = _Asked(tp_size, dtype, section if isinstance(section, Mapping) else {})
    return model


def with_asked(model: nn.Module, config: Mapping[str, Any] | str | Path | None) -> Any:
    """The config, with what `tp_model_init` was told where it does not say so itself.

    Raises ConfigError where the two say different numbers of ranks.
    """
    asked: _Asked | None = model.__dict__.get(_ASKED)
    if asked is None:
        return config
    document = dict(read(config).data)
    section = {**asked.section, **(document.get(_SECTION) or {})}
    theirs = section.get("autotp_size") or (section.get("tp") or {}).get("tp_size")
    if theirs not in (None, "auto", asked.size):
        raise ConfigError(
            f"tp_model_init was told tp_size = {asked.size}, and {_SECTION}.autotp_size is {theirs}: say one of them",
            path=f"{_SECTION}.autotp_size",
            expected=str(asked.size),
            got=str(theirs),
        )
    document[_SECTION] = {**section, "autotp_size": asked.size}
    return document


def check_dtype(model: nn.Module, config: Config) -> None:
    """Raises ConfigError where the model trains in another dtype than `tp_model_init` was told."""
    asked: _Asked | None = model.__dict__.get(_ASKED)
    found = torch_dtype(config.precision.dtype)
    if asked is not None and asked.dtype not in (None, found):
        raise ConfigError(
            f"tp_model_init was told {asked.dtype}, and the config trains in {found}: say the same, or None",
            path="dtype",
            expected=str(found),
            got=str(asked.dtype),
        )
