"""Between torch tensors and the core: the only place where addresses are taken.

A spec made here promises what the core relies on: contiguous CPU memory of the given dtype, alive while the spec is.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from zeroxide import _core
from zeroxide.errors import ModelError

__all__ = ["DTYPE_NAMES", "memory_at", "spec", "view_of"]

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_NAMES = DTYPE_NAMES | {torch.int64: "int64", torch.uint8: "uint8"}


def spec(tensor: torch.Tensor) -> _core.TensorSpec:
    """The memory of `tensor`, any shape, for one call into the core.

    Raises ModelError when the tensor is not contiguous, not in host memory, or not fp32, bf16, fp16, int64 or
    uint8.
    """
    # Called for every gradient: each look at the tensor counts.
    name = _NAMES.get(tensor.dtype)
    if name is None or not tensor.is_cpu or not tensor.is_contiguous():
        raise ModelError(
            f"expected a contiguous fp32, bf16, fp16, int64 or uint8 tensor in host memory, got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
        )
    return _core.TensorSpec(tensor, tensor.data_ptr(), tensor.numel(), name)


def memory_at(address: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of the core as a flat tensor; valid as long as the call that gave the address says."""
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype)


def view_of(window: Any, dtype: torch.dtype, start: int = 0, numel: int = -1) -> torch.Tensor:
    """A window, or `numel` elements of it from byte `start` on, as a flat tensor that keeps its address range reserved.

    It shares the window's memory, and nothing but that with other views: its storage is as long as it is, so that what
    saves tensors by their storage takes these elements alone.
    """
    return torch.frombuffer(window, dtype=dtype, offset=start, count=numel)
