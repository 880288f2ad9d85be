"""Block-wise int8 and int4 for compressed collectives: `cuda/kernels/quantise.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

import torch

from zeroxide.device.placement import address
from zeroxide.errors import TensorError
from zeroxide.kernels.arguments import FLOATS, blocks_for, check, short
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.fallback import by_torch
from zeroxide.kernels.launch import Kernel, Launcher
from zeroxide.kernels.launchers import kernels_for
from zeroxide.kernels.philox import random_words

__all__ = [
    "BLOCK",
    "CASES",
    "KERNELS",
    "Quantised",
    "dequantise",
    "expander_for",
    "quantise",
    "reference",
    "reference_values",
]

THREADS = 256
EACH = 8
BLOCK = 256
"""Elements that share a scale."""

LEVELS = {8: 127, 4: 7}
CODES = {8: torch.int8, 4: torch.uint8}

QUANTISE = {
    (bits, dtype): Kernel("quantise", f"zx_quantise_int{bits}_{name}", THREADS)
    for bits in LEVELS
    for dtype, name in FLOATS.items()
}
DEQUANTISE = {
    (bits, dtype): Kernel("quantise", f"zx_dequantise_int{bits}_{name}", THREADS)
    for bits in LEVELS
    for dtype, name in FLOATS.items()
}
KERNELS = (*QUANTISE.values(), *DEQUANTISE.values())


class _Quantise(Structure):
    _fields_ = (
        ("values", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("elements", c_int64),
        ("seed", c_uint64),
        ("offset", c_uint64),
        ("at_random", c_uint32),
    )


class _Dequantise(Structure):
    _fields_ = (("codes", c_void_p), ("scales", c_void_p), ("values", c_void_p), ("elements", c_int64))


@dataclass(frozen=True)
class Quantised:
    """Values as integers. bits: 8 or 4. codes: int8, one an element, or uint8, two elements a byte, the first in the
    lower half. scales: bf16, one for each 256 elements. elements: how many values there are."""

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    elements: int


def quantise(
    launcher: Launcher, values: torch.Tensor, bits: int, *, seed: int | None = None, offset: int = 0
) -> Quantised:
    """`values`, contiguous, fp32, bf16 or fp16, any shape, as integers of 8 or 4 bits.

    Rounded to nearest, ties to even; with a seed at random, so that the mean is the value, by the random numbers from
    place `offset` of the seed's sequence on: one place for four elements. Both are at least 0 and below 2^63. A
    block of 256 with an infinity or a NaN comes back as NaN. Raises TensorError, and ValueError for other bits.
    """
    check("quantise", "values", values, FLOATS)
    result = _room(values, bits)
    kernel = QUANTISE[bits, values.dtype]
    if by_torch(launcher, kernel):
        return reference(values, bits, seed=seed, offset=offset)
    if values.numel():
        args = _Quantise(
            address(values),
            address(result.codes),
            address(result.scales),
            values.numel(),
            seed or 0,
            offset,
            seed is not None,
        )
        blocks = blocks_for(result.scales.numel(), THREADS * EACH // BLOCK)
        launcher.launch(kernel, blocks, bytes(args))
    return result


def _room(values: torch.Tensor, bits: int) -> Quantised:
    if bits not in LEVELS:
        raise ValueError(f"quantise: {bits} bits: expected 8 or 4")
    elements = values.numel()
    codes = torch.empty(-(-elements * bits // 8), dtype=CODES[bits], device=values.device)
    scales = torch.empty(-(-elements // BLOCK), dtype=torch.bfloat16, device=values.device)
    return Quantised(bits, codes, scales, elements)


def expander_for(values: torch.Tensor, bits: int, dtype: torch.dtype) -> Launcher | None:
    """What `dequantise` takes for values where a tensor is; None where `launchers.kernels_for` says so."""
    return kernels_for(values, DEQUANTISE[bits, dtype]) if dtype in FLOATS else None


def dequantise(
    launcher: Launcher, quantised: Quantised, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The values that the integers stand for, flat, as fp32, bf16 or fp16, in `out` where that is given. Raises
    TensorError."""
    if dtype not in FLOATS:
        expected = " or ".join(short(each) for each in FLOATS)
        raise TensorError(
            f"dequantise: dtype is {short(dtype)}: expected {expected}",
            name="dtype",
            expected=expected,
            got=short(dtype),
        )
    bits, elements, codes = quantised.bits, quantised.elements, quantised.codes
    check("dequantise", "codes", codes, [CODES[bits]], numel=-(-elements * bits // 8))
    check("dequantise", "scales", quantised.scales, [torch.bfloat16], like=codes, numel=-(-elements // BLOCK))
    if out is not None:
        check("dequantise", "out", out, [dtype], like=codes, numel=elements)
    kernel = DEQUANTISE[bits, dtype]
    if by_torch(launcher, kernel):
        found = reference_values(quantised, dtype)
        return found if out is None else out.copy_(found.view_as(out))
    values = torch.empty(elements, dtype=dtype, device=codes.device) if out is None else out
    if elements:
        args = _Dequantise(address(codes), address(quantised.scales), address(values), elements)
        launcher.launch(kernel, blocks_for(elements, THREADS * EACH), bytes(args))
    return values


def reference(values: torch.Tensor, bits: int, *, seed: int | None = None, offset: int = 0) -> Quantised:
    """What torch makes of the same."""
    levels, elements = LEVELS[bits], values.numel()
    padded = torch.zeros(-(-elements // BLOCK) * BLOCK, dtype=torch.float32, device=values.device)
    padded[:elements] = values.reshape(-1)
    rows = padded.view(-1, BLOCK)
    largest = rows.abs().amax(dim=1) if elements else rows.new_zeros(0)
    # By a tensor: torch divides by a number of the host by multiplying with its reciprocal.
    scales = _bf16_up(largest / torch.full_like(largest, levels))
    scales = torch.where(largest.isfinite(), scales, torch.full_like(scales, float("nan")))
    quotients = rows / scales[:, None].float()
    if seed is None:
        rounded = quotients.round()
    else:
        words = random_words(padded.numel(), seed, offset, values.device).view_as(rows)
        rounded = (quotients + (words >> 8).float() * 2.0**-24).floor()
    rounded = torch.where(scales[:, None] > 0, rounded, torch.zeros_like(rounded)).clamp(-levels, levels)
    codes = rounded.to(torch.int8).view(-1)[:elements]
    if bits == 4:
        even = torch.zeros(-(-elements // 2) * 2, dtype=torch.int16, device=values.device)
        even[:elements] = codes
        pairs = (even & 15).view(-1, 2)
        codes = (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8)
    return Quantised(bits, codes, scales, elements)


def _bf16_up(values: torch.Tensor) -> torch.Tensor:
    """fp32 numbers of at least 0, rounded up to bf16."""
    raised = (values.view(torch.int32) + 0xFFFF) >> 16
    return raised.to(torch.int16).view(torch.bfloat16)


def reference_values(quantised: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """What torch makes of the same integers."""
    codes, elements = quantised.codes, quantised.elements
    if quantised.bits == 4:
        halves = torch.stack([codes & 15, codes >> 4], dim=1).view(-1)[:elements]
        codes = (halves.to(torch.int16) ^ 8) - 8
    scales = quantised.scales.float().repeat_interleave(BLOCK)[:elements]
    largest = torch.finfo(torch.float32).max
    return (codes.float() * scales).clamp(-largest, largest).to(dtype)


def _case(bits: int, dtype: torch.dtype, seed: int | None) -> KernelCase:
    def make(n: int, device: torch.device) -> Inputs:
        return {"values": [numbers(n, 1, dtype, device)]}

    def outputs(quantised: Quantised) -> Sequence[torch.Tensor]:
        return [quantised.codes, quantised.scales]

    offset = (1 << 34) - 3
    return KernelCase(
        name=f"quantise_int{bits}_{FLOATS[dtype]}{'' if seed is None else '_at_random'}",
        make=make,
        run=lambda launcher, inputs: outputs(quantise(launcher, inputs["values"][0], bits, seed=seed, offset=offset)),
        reference=lambda inputs: outputs(reference(inputs["values"][0], bits, seed=seed, offset=offset)),
        moved=lambda n: n * dtype.itemsize + n * bits // 8 + 2 * n // BLOCK,
    )


def _back(bits: int, dtype: torch.dtype) -> KernelCase:
    def make(n: int, device: torch.device) -> Inputs:
        quantised = reference(numbers(n, 1, torch.float32, device), bits)
        return {"codes": [quantised.codes], "scales": [quantised.scales], "values": [torch.empty(n, device=device)]}

    def given(inputs: Inputs) -> Quantised:
        return Quantised(bits, inputs["codes"][0], inputs["scales"][0], inputs["values"][0].numel())

    return KernelCase(
        name=f"dequantise_int{bits}_{FLOATS[dtype]}",
        make=make,
        run=lambda launcher, inputs: [dequantise(launcher, given(inputs), dtype)],
        reference=lambda inputs: [reference_values(given(inputs), dtype)],
        moved=lambda n: n * dtype.itemsize + n * bits // 8 + 2 * n // BLOCK,
    )


CASES = (
    *(_case(bits, dtype, seed) for bits, dtype in QUANTISE for seed in (None, (5 << 40) + 77)),
    *(_back(bits, dtype) for bits, dtype in DEQUANTISE),
)
