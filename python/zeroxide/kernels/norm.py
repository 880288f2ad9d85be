"""The norm of many gradients and whether one of them is not finite, in one pass: `cuda/kernels/norm.cu`.

The sum of squares has the bits of the core's: the order of its sums is fixed by tensors alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass

import torch

from zeroxide.device.placement import HOST, address, addresses, in_host
from zeroxide.errors import TensorError
from zeroxide.kernels.arguments import FLOATS, blocks_for, check_alike, table
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.fallback import by_torch
from zeroxide.kernels.launch import Kernel, Launcher

__all__ = ["CASES", "KERNELS", "TOTAL", "Norm", "reference", "scaled_norm", "sums_of_squares"]

THREADS = 256
CHUNK = 4096
PIECE = 64 * CHUNK
SUMS = 16
PARTS = 70
PIECES_AT_ONCE = 16
"""Pieces whose squares torch holds in float64: 32 MiB."""

CHUNKS = {dtype: Kernel("norm", f"zx_norm_chunks_{name}", THREADS) for dtype, name in FLOATS.items()}
PIECES = Kernel("norm", "zx_norm_pieces", THREADS)
TOTAL = Kernel("norm", "zx_norm_total", THREADS)
KERNELS = (*CHUNKS.values(), PIECES, TOTAL)


class _Chunks(Structure):
    _fields_ = (("segments", c_void_p), ("count", c_int64), ("chunks", c_int64), ("chunk_sums", c_void_p))


class _Pieces(Structure):
    _fields_ = (
        ("segments", c_void_p),
        ("count", c_int64),
        ("pieces", c_int64),
        ("chunks", c_int64),
        ("chunk_sums", c_void_p),
        ("piece_sums", c_void_p),
    )


class _Total(Structure):
    _fields_ = (
        ("segments", c_void_p),
        ("count", c_int64),
        ("pieces", c_int64),
        ("scale", c_double),
        ("piece_sums", c_void_p),
        ("segment_sums", c_void_p),
        ("result", c_void_p),
        ("nonfinite", c_void_p),
    )


@dataclass(frozen=True)
class Norm:
    """Tensors of no dimension on the gradients' device.

    sum_squares: float64, before the scale. norm: float64, the root of that times the scale. nonfinite: int64, 1 where
    an element is infinite or NaN; the others are infinite or NaN then.
    """

    sum_squares: torch.Tensor
    norm: torch.Tensor
    nonfinite: torch.Tensor


def scaled_norm(launcher: Launcher, tensors: Sequence[torch.Tensor], scale: float = 1.0) -> Norm:
    """The norm of `tensors` together: contiguous, of one dtype (fp32, bf16 or fp16) and device, any shapes.

    Raises TensorError.
    """
    return _run("scaled_norm", launcher, tensors, scale)[0]


def sums_of_squares(launcher: Launcher, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of squares of each of `tensors`, as `scaled_norm` takes them but none of them empty: float64, one element
    a tensor, infinite or NaN where an element of the tensor is. Raises TensorError.
    """
    if 0 in (sizes := [tensor.numel() for tensor in tensors]):
        name = f"tensors[{sizes.index(0)}]"
        raise TensorError(
            f"sums_of_squares: {name} has no element: expected one at least", name=name, expected="elements", got="none"
        )
    return _run("sums_of_squares", launcher, tensors, 1.0)[1]


def _run(call: str, launcher: Launcher, tensors: Sequence[torch.Tensor], scale: float) -> tuple[Norm, torch.Tensor]:
    """The norm of all tensors, and the sum of squares of each that is not empty."""
    if not tensors:
        raise TensorError(f"{call}: no tensors: expected at least one", name="tensors", expected="one", got="none")
    first = tensors[0]
    check_alike(call, "tensors", tensors, first)
    if by_torch(launcher, CHUNKS[first.dtype], PIECES, TOTAL):
        return _by_torch(tensors, scale)
    device = first.device
    result = torch.zeros(2, dtype=torch.float64, device=device)
    nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
    rows: list[int] = []
    count = chunks = pieces = 0
    for where, numel in zip(addresses(tensors), [tensor.numel() for tensor in tensors], strict=True):
        if numel:
            rows += (where, numel, chunks, pieces)
            count += 1
            chunks += -(-numel // CHUNK)
            pieces += -(-numel // PIECE)
    sums = torch.empty(chunks + pieces + count, dtype=torch.float64, device=device)
    if count:
        segments = table(rows, device)
        of_chunks = address(sums)
        of_pieces = of_chunks + chunks * sums.itemsize
        of_segments = of_pieces + pieces * sums.itemsize
        where = address(segments)
        # A lane has the sums of 4 bytes.
        a_block = THREADS * 4 // first.element_size() // SUMS
        chunk_args = _Chunks(where, count, chunks, of_chunks)
        launcher.launch(CHUNKS[first.dtype], blocks_for(chunks, a_block), bytes(chunk_args))
        piece_args = _Pieces(where, count, pieces, chunks, of_chunks, of_pieces)
        launcher.launch(PIECES, blocks_for(pieces, THREADS), bytes(piece_args))
        total_args = _Total(where, count, pieces, scale, of_pieces, of_segments, address(result), address(nonfinite))
        launcher.launch(TOTAL, 1, bytes(total_args))
    return Norm(result[0], result[1], nonfinite[0]), sums[chunks + pieces :]


def reference(tensors: Sequence[torch.Tensor], scale: float = 1.0) -> Norm:
    """What torch makes of the same, sum by sum in the same order."""
    return _by_torch(tensors, scale)[0]


def _by_torch(tensors: Sequence[torch.Tensor], scale: float) -> tuple[Norm, torch.Tensor]:
    """What `_run` gives. torch adds up chunks, the host what they come to; there sqrt is correctly rounded, too."""
    sums = [_sum_of_squares(tensor.detach().view(-1)) for tensor in tensors if tensor.numel()]
    total = 0.0
    for each in sums:
        total += each
    device = tensors[0].device
    values = torch.tensor([total, math.sqrt(total) * scale, *sums], dtype=torch.float64, device=HOST).to(device)
    nonfinite = torch.tensor(int(not math.isfinite(total)), device=HOST).to(device)
    return Norm(values[0], values[1], nonfinite), values[2:]


def _sum_of_squares(flat: torch.Tensor) -> float:
    total, of_piece, chunks = 0.0, 0.0, 0
    for pieces in torch.split(flat, PIECES_AT_ONCE * PIECE):
        for chunk in in_host(chunk_sums(pieces)).tolist():
            of_piece += chunk
            chunks += 1
            if chunks == PIECE // CHUNK:
                total, of_piece, chunks = total + of_piece, 0.0, 0
    return total + of_piece


def chunk_sums(flat: torch.Tensor) -> torch.Tensor:
    """Sums of squares of each chunk of a flat tensor, float64."""
    chunks = -(-flat.numel() // CHUNK)
    squares = torch.zeros(chunks * CHUNK, dtype=torch.float64, device=flat.device)
    squares[: flat.numel()] = flat.double().square()
    rows = squares.view(chunks, CHUNK // SUMS, SUMS)
    sums = torch.zeros(chunks, SUMS, dtype=torch.float64, device=flat.device)
    for row in range(CHUNK // SUMS):
        sums = sums + rows[:, row]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums.view(-1)


def _case(dtype: torch.dtype, name: str) -> KernelCase:
    def make(n: int, device: torch.device) -> Inputs:
        # One large tensor and many small ones, of magnitudes that make every rounding of a sum count.
        parts = [n // 2, *(n // 2 // PARTS for _ in range(PARTS - 1))]
        drawn = [numbers(part, seed, torch.float32, device) for seed, part in enumerate([*parts, n - sum(parts)])]
        return {"tensors": [(each * each.square()).to(dtype) for each in drawn]}

    def outputs(norm: Norm) -> list[torch.Tensor]:
        return [norm.sum_squares, norm.norm, norm.nonfinite]

    return KernelCase(
        name=f"norm_{name}",
        make=make,
        run=lambda launcher, inputs: outputs(scaled_norm(launcher, inputs["tensors"], math.pi)),
        reference=lambda inputs: outputs(reference(inputs["tensors"], math.pi)),
        moved=lambda n: n * dtype.itemsize,
    )


CASES = tuple(_case(dtype, name) for dtype, name in FLOATS.items())
