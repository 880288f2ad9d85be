"""The keyword arguments that stand in for a config file, and what they mean together with one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import PlainValidator

from zeroxide.config.check import show
from zeroxide.config.fields import Betas, Count, MemorySize, NonNegative, Section, directory, expecting
from zeroxide.config.resolved import Offload
from zeroxide.config.schema_precision import dtype_named
from zeroxide.errors import ConfigError

__all__ = ["Shortcuts", "agree"]

T = TypeVar("T")


def _offload(value: Any) -> Offload:
    if isinstance(value, Offload):
        return value
    kind, colon, path = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "nvme" and colon:
        return Offload("nvme", directory(path))
    if kind == "cpu" and not colon:
        return Offload("cpu")
    if kind == "none" and not colon:
        return Offload("none")
    raise ValueError


Home = Annotated[Offload, PlainValidator(_offload), expecting('"none", "cpu" or "nvme:DIRECTORY"')]
Precision = Annotated[
    Literal["bf16", "fp16", "fp32"], PlainValidator(dtype_named), expecting('"bf16", "fp16" or "fp32"')
]


class Shortcuts(Section):
    """Every field is one keyword argument of `zeroxide.initialize`, unset when `None`."""

    lr: NonNegative | None = None
    betas: Betas | None = None
    eps: NonNegative | None = None
    weight_decay: NonNegative | None = None
    offload: Home | None = None
    offload_param: Home | None = None
    offload_optimizer: Home | None = None
    host_memory: MemorySize | None = None
    dtype: Precision | None = None
    gradient_clipping: NonNegative | None = None
    gradient_accumulation_steps: Count | None = None


def agree(keyword: str, given: T | None, path: str, configured: T | None) -> T | None:
    """Return whichever of the two is set. Raises `ConfigError` naming both when they are set and differ."""
    if given is None:
        return configured
    if configured is not None and configured != given:
        raise ConfigError(
            f"{keyword}={show(given)} contradicts {path} = {show(configured)} in the config; give only one of them",
            path=path,
            expected=show(configured),
            got=show(given),
        )
    return given
