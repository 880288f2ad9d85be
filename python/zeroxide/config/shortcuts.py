"""The keyword arguments that stand in for a config file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from zeroxide.config.fields import Betas, Count, MemorySize, NonNegative, Section, directory, expecting
from zeroxide.config.sections.precision import dtype_named
from zeroxide.config.sections.zero import Offload

__all__ = ["Shortcuts"]


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
