"""What wrappers check of tensors, and how they hand addresses and sizes to a kernel."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence

import torch

from zeroxide.device.placement import of_buffer
from zeroxide.errors import TensorError

__all__ = ["FLOATS", "blocks_for", "check", "check_alike", "dtype_number", "table"]

FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""The dtypes that kernels read and write as numbers, by what entry points call them; in the order of `zx::Dtype`."""

LARGEST_GRID = 4096
"""Blocks of the largest launch: enough to fill any GPU several times. Lanes go on to what lies beyond their grid."""


_NUMBERS = {dtype: number for number, dtype in enumerate(FLOATS)}


def dtype_number(dtype: torch.dtype) -> int:
    """The number of a dtype of `FLOATS` in `zx::Dtype`."""
    return _NUMBERS[dtype]


def blocks_for(items: int, each: int) -> int:
    """Blocks of a launch over `items`, of which a block works on `each` at a time; at least 1."""
    blocks = -(-items // each)
    return LARGEST_GRID if blocks > LARGEST_GRID else blocks or 1


def check(
    call: str,
    name: str,
    tensor: torch.Tensor,
    dtypes: Collection[torch.dtype],
    *,
    like: torch.Tensor | None = None,
    numel: int | None = None,
) -> None:
    """Refuses a tensor that is not contiguous, or of none of `dtypes`, or not on the device of `like`, or that has not
    `numel` elements.

    Raises TensorError with the argument's name, and what it should be and is.
    """
    # One expression: this is a large part of what a launch costs the host.
    if (
        tensor.dtype in dtypes
        and tensor.is_contiguous()
        and (like is None or tensor.device == like.device)
        and (numel is None or tensor.numel() == numel)
    ):
        return

    def refuse(expected: str, got: str) -> None:
        raise TensorError(f"{call}: {name} is {got}: expected {expected}", name=name, expected=expected, got=got)

    if tensor.dtype not in dtypes:
        refuse(" or ".join(short(dtype) for dtype in dtypes), short(tensor.dtype))
    if not tensor.is_contiguous():
        refuse("a contiguous tensor", f"strided {tuple(tensor.stride())} over {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        refuse(f"a tensor on {like.device}", f"on {tensor.device}")
    refuse(f"a tensor of {numel} elements", f"of {tensor.numel()} elements")


def check_alike(call: str, name: str, tensors: Sequence[torch.Tensor], like: torch.Tensor) -> None:
    """Refuses those of `tensors`, of which there is one, that are not contiguous, of one dtype of `FLOATS` and on the
    device of `like`. Raises TensorError as `check` does.
    """
    check(call, f"{name}[0]", tensors[0], FLOATS, like=like)
    dtype, device = tensors[0].dtype, like.device
    for at, tensor in enumerate(tensors):
        if tensor.dtype is not dtype or tensor.device != device or not tensor.is_contiguous():
            check(call, f"{name}[{at}]", tensor, [dtype], like=like)


def short(dtype: torch.dtype) -> str:
    """The dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def table(rows: Iterable[int], device: torch.device) -> torch.Tensor:
    """Rows of addresses and sizes, one behind the other, in memory of the device: an int64 tensor that must live until
    the launch.

    Kernels of the same stream may use its memory after that: torch gives it to nothing that comes before them.
    """
    return of_buffer(array("q", rows), torch.int64).to(device)
