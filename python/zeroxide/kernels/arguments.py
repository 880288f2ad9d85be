"""What wrappers check of tensors, and how they hand addresses and sizes to a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from zeroxide.device.placement import HOST
from zeroxide.errors import TensorError

__all__ = ["FLOATS", "blocks_for", "check", "dtype_number", "table"]

FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""The dtypes that kernels read and write as numbers, by what entry points call them; in the order of `zx::Dtype`."""

LARGEST_GRID = 4096
"""Blocks of the largest launch: enough to fill any GPU several times. Lanes go on to what lies beyond their grid."""


def dtype_number(dtype: torch.dtype) -> int:
    """The number of a dtype of `FLOATS` in `zx::Dtype`."""
    return list(FLOATS).index(dtype)


def blocks_for(items: int, each: int) -> int:
    """Blocks of a launch over `items`, of which a block works on `each` at a time; at least 1."""
    return max(1, min(-(-items // each), LARGEST_GRID))


def check(
    call: str,
    name: str,
    tensor: torch.Tensor,
    dtypes: Iterable[torch.dtype],
    *,
    like: torch.Tensor | None = None,
    numel: int | None = None,
) -> None:
    """Refuses a tensor that is not contiguous, or of none of `dtypes`, or not on the device of `like`, or that has not
    `numel` elements.

    Raises TensorError with the argument's name, and what it should be and is.
    """

    def refuse(expected: str, got: str) -> None:
        raise TensorError(f"{call}: {name} is {got}: expected {expected}", name=name, expected=expected, got=got)

    allowed = tuple(dtypes)
    if tensor.dtype not in allowed:
        refuse(" or ".join(short(dtype) for dtype in allowed), short(tensor.dtype))
    if not tensor.is_contiguous():
        refuse("a contiguous tensor", f"strided {tuple(tensor.stride())} over {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        refuse(f"a tensor on {like.device}", f"on {tensor.device}")
    if numel is not None and tensor.numel() != numel:
        refuse(f"a tensor of {numel} elements", f"of {tensor.numel()} elements")


def short(dtype: torch.dtype) -> str:
    """The dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def table(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of addresses and sizes in memory of the device: an int64 tensor that must live until the launch.

    Kernels of the same stream may use its memory after that: torch gives it to nothing that comes before them.
    """
    return torch.tensor(rows, dtype=torch.int64, device=HOST).to(device)
