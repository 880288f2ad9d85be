"""Tensors of any dtype as the bytes that they are, and the few conversions that are allowed.

Frozen parameters and buffers keep dtype and bits. What cannot be taken as bytes is named by `why_not_bytes`: layouts
without one run of elements, quantized tensors, and subclasses that keep their values in other tensors.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zeroxide import _core
from zeroxide.device.placement import HOST, address, in_host, plain, spec

__all__ = [
    "FLOATS",
    "ORDINARY",
    "bytes_of",
    "converted",
    "converts",
    "copy_of",
    "exact_in_fp32",
    "fingerprint",
    "holds_exactly",
    "round_into",
    "same_width",
    "tensor_of",
    "why_not_bytes",
]

ORDINARY = (torch.float32, torch.bfloat16, torch.float16)
"""What forward computes in; values of one become another's by rounding."""

FLOATS = (torch.float64, *ORDINARY)
"""What new values for one of them may come in."""

_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_EXACT_IN_FP32 = frozenset(
    {
        *ORDINARY,
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        torch.float8_e8m0fnu,
    }
)


def why_not_bytes(tensor: torch.Tensor) -> str | None:
    """Why the tensor's values are no run of bytes in memory, in words that follow "it"; None if they are."""
    if is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}, which keeps its values in other tensors"
    if tensor.layout is not torch.strided or tensor.is_nested:
        name = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"has layout {name}"
    if tensor.is_quantized:
        return f"has the quantized dtype {tensor.dtype}"
    return None


def fingerprint(tensor: torch.Tensor) -> int:
    """A checksum of all bytes of the tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return _core.checksum(spec(in_host(bytes_of(tensor.detach()))))


def same_width(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a dtype that can be copied: some cannot under their own."""
    return tensor.view(_WIDTHS[tensor.dtype.itemsize])


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, flat uint8, in the order of its elements; its own memory if it can be."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = plain.resolve_conj()
    plain = plain.resolve_neg()
    if not plain.is_contiguous():
        plain = same_width(plain).contiguous()
    # Also where a single element has an odd stride.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def tensor_of(raw: torch.Tensor, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """Flat bytes as a tensor of `dtype` and `shape` over the same memory."""
    return raw.view(dtype).view(shape)


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory of their own, contiguous; dtypes that torch cannot copy are copied as bytes."""
    return tensor_of(bytes_of(tensor).clone(), tensor.dtype, tensor.shape)


def converts(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether `converted` takes values from one dtype to the other."""
    return stored == dtype or (stored in ORDINARY and dtype in ORDINARY)


def converted(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in `dtype`: every bit of theirs where it is their own, else rounded as live weights are, bf16 half up."""
    if values.dtype == dtype:
        return values
    assert converts(values.dtype, dtype), f"{values.dtype} to {dtype} has been refused"
    if dtype is not torch.bfloat16:
        return values.to(dtype)
    out = torch.empty(values.shape, dtype=dtype, device=HOST)
    round_into(plain(values.to(torch.float32)), out)
    return out


def round_into(values: torch.Tensor, out: torch.Tensor) -> None:
    """Writes fp32 values into `out` of as many elements, rounded to its dtype as live weights are: bf16 half up.

    Both are contiguous and in host memory; `out` may be `values`.
    """
    if out.dtype is torch.bfloat16:
        if values.numel():
            _core.round_bf16(spec(values), spec(out))
    elif address(out) != address(values):
        out.copy_(values)


def exact_in_fp32(dtype: torch.dtype) -> bool:
    """Whether fp32 holds every value of the dtype."""
    return dtype in _EXACT_IN_FP32


def holds_exactly(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether every one of the values is one of `dtype`."""
    if values.dtype == dtype or not values.numel():
        return True
    if values.is_complex() and not dtype.is_complex:
        return False
    try:
        if _is_integral(values.dtype) and _is_integral(dtype):
            # There and back would wrap around.
            bounds = torch.iinfo(dtype)
            return bool(values.min() >= bounds.min) and bool(values.max() <= bounds.max)
        return torch.equal(bytes_of(values.to(dtype).to(values.dtype)), bytes_of(values))
    except (RuntimeError, TypeError):
        return False


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)
