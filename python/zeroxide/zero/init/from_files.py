"""Parameters that are filled from mapped files, as those of safetensors are: pages that were copied leave the process.

A library that maps a checkpoint holds the mapping until all of it is loaded, so that the whole file would be resident
beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zeroxide import _core
from zeroxide.device.placement import in_host_memory, spec
from zeroxide.precision.bits import bytes_of, why_not_bytes

__all__ = ["FromFiles", "drop_mapped"]

PIECE = 16 << 20
"""Bytes of a source that are copied before its pages leave."""


class FromFiles(TorchFunctionMode):
    """Sees what is copied into `params`; everything else passes."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._params = {id(param) for param in params}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_ and len(args) == 2 and not kwargs and id(args[0]) in self._params:
            target, source = args
            plain = type(source) in (torch.Tensor, nn.Parameter) and _is_memory(source) and source.dim() > 0
            if plain and target.shape == source.shape and not torch.is_grad_enabled():
                return _copied(target, source)
        return func(*args, **(kwargs or {}))


def _is_memory(values: torch.Tensor) -> bool:
    """Whether the tensor is bytes in a row in host memory."""
    return in_host_memory(values) and values.is_contiguous() and why_not_bytes(values) is None


def _copied(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`target.copy_(source)`, rows of at most `PIECE` bytes at a time; a row may be larger."""
    rows = max(1, PIECE // max(1, source[:1].nbytes))
    for at in range(0, len(source), rows):
        target[at : at + rows].copy_(source[at : at + rows])
        drop_mapped(source[at : at + rows])
    return target


def drop_mapped(values: torch.Tensor) -> None:
    """Pages of a tensor that are nothing but a file's leave the process; they come back when they are read.

    Nobody writes into the tensor meanwhile.
    """
    if _is_memory(values):
        # Locked memory, and a system that does not tell of pages, keep theirs: nothing but memory is lost by that.
        with suppress(OSError):
            _core.drop_pages_of_files(spec(bytes_of(values.detach())))
