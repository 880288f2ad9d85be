"""Where tensors are: the only place that knows what compute memory is and takes addresses.

Compute memory is where forward and backward run, with the weights under their windows; in this version it is host
memory, so that what is on the compute device can be given to the core by its address. Another device changes this file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import AbstractContextManager
from operator import methodcaller
from typing import Any

import torch

from zeroxide import _core

__all__ = [
    "COMPUTE",
    "DTYPE_NAMES",
    "address",
    "addresses",
    "autocast",
    "autocast_dtype",
    "device_kind",
    "has_values",
    "in_compute_memory",
    "lies_within",
    "memory_at",
    "of_buffer",
    "plain",
    "spec",
    "storage_address",
    "to_host",
    "view_of",
]

COMPUTE = torch.device("cpu")
"""Where the model computes, and where its parameters are when they come."""


DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_ADDRESS = methodcaller("data_ptr")


def spec(tensor: torch.Tensor) -> _core.TensorSpec:
    """The memory of `tensor`, any shape, for one call into the core, which relies on it while the spec is alive.

    Raises ModelError when the tensor is not contiguous, not in host memory, not fp32, bf16, fp16, int64 or uint8, or
    has its negative bit set.
    """
    return _core.TensorSpec(tensor)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its values as they are, one after the other in memory: itself where that is so.

    What torch negates by a bit alone holds the opposites in memory.
    """
    return tensor.resolve_neg().contiguous()


def memory_at(address: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of the core as a flat tensor; valid as long as the call that gave the address says."""
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype)


def view_of(window: Any, dtype: torch.dtype, start: int = 0, numel: int = -1) -> torch.Tensor:
    """A window, or `numel` elements of it from byte `start` on, as a flat tensor that keeps its address range reserved.

    It shares the window's memory, and nothing but that with other views: its storage is as long as it is, so that what
    saves tensors by their storage takes these elements alone.
    """
    return torch.frombuffer(window, dtype=dtype, offset=start, count=numel)


def of_buffer(memory: Any, dtype: torch.dtype, start: int = 0, numel: int = -1) -> torch.Tensor:
    """`numel` elements (-1: all) of host memory that is no tensor's, from byte `start` on, as a flat tensor over it."""
    return torch.frombuffer(memory, dtype=dtype, offset=start, count=numel)


def in_compute_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor is where the model computes; a meta tensor is nowhere."""
    return tensor.device.type == COMPUTE.type


def device_kind(tensor: torch.Tensor) -> str:
    """The kind of device that the tensor is on, in torch's words: "cpu", "cuda", "meta"."""
    return tensor.device.type


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the tensor has memory at all, which one on the meta device has not."""
    return tensor.device.type != "meta"


def to_host(values: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
    """fp32 values in host memory, flat and contiguous, for the core to read; with `copy`, never the tensor's own."""
    return plain(values.detach().to(device="cpu", dtype=torch.float32, copy=copy)).view(-1)


def address(tensor: torch.Tensor) -> int:
    """Where the tensor's first element is, to compare with another; 0 for one that has no element."""
    return tensor.data_ptr()


def addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    """`address` of each."""
    return [*map(_ADDRESS, tensors)]


def storage_address(tensor: torch.Tensor) -> int:
    """Where the memory begins that the tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def lies_within(tensor: torch.Tensor, first: int, end: int) -> bool:
    """Whether the tensor is in compute memory and begins at an address from `first` on and before `end`."""
    return tensor.device.type == COMPUTE.type and first <= tensor.data_ptr() < end


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """torch.autocast where the model computes, without its cache: weights change between passes."""
    return torch.autocast(COMPUTE.type, dtype, cache_enabled=False)


def autocast_dtype() -> torch.dtype | None:
    """What autocast computes in where the model computes; None outside of it."""
    return torch.get_autocast_dtype(COMPUTE.type) if torch.is_autocast_enabled(COMPUTE.type) else None
