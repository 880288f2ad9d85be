"""A gradient that arrives in its home buffer: `cuda/kernels/accumulate.cu`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int64, c_uint32, c_void_p

import torch

from zeroxide.device.placement import address
from zeroxide.kernels.arguments import FLOATS, blocks_for, check
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.fallback import by_torch
from zeroxide.kernels.launch import Kernel, Launcher

__all__ = ["CASES", "KERNELS", "accumulate", "reference"]

THREADS = 256
EACH = 8

BY_DTYPES = {
    (home, gradient): Kernel("accumulate", f"zx_accumulate_{name}_{other}", THREADS)
    for home, name in FLOATS.items()
    for gradient, other in FLOATS.items()
}
KERNELS = tuple(BY_DTYPES.values())


class _Arguments(Structure):
    _fields_ = (
        ("home", c_void_p),
        ("gradient", c_void_p),
        ("elements", c_int64),
        ("scale", c_float),
        ("add", c_uint32),
    )


_PACK = struct.Struct("=QQqfI").pack
"""The bytes of `_Arguments`, sooner than by it: there is a launch for each gradient."""


def accumulate(
    launcher: Launcher, home: torch.Tensor, gradient: torch.Tensor, *, add: bool, scale: float = 1.0
) -> None:
    """Stores `scale * gradient` in `home`, or adds it to what is there; computed in fp32, rounded to nearest even.

    With a scale of 1 the bits are those of the core. Both contiguous, fp32, bf16 or fp16, of one device and as many
    elements; they do not overlap. Raises TensorError.
    """
    check("accumulate", "the home", home, FLOATS)
    check("accumulate", "the gradient", gradient, FLOATS, like=home, numel=home.numel())
    kernel = BY_DTYPES[home.dtype, gradient.dtype]
    if by_torch(launcher, kernel):
        home.view(-1).copy_(reference(home.view(-1), gradient.view(-1), add=add, scale=scale))
    elif home.numel():
        numel = home.numel()
        args = _PACK(address(home), address(gradient), numel, scale, add)
        launcher.launch(kernel, blocks_for(numel, THREADS * EACH), args)


def reference(home: torch.Tensor, gradient: torch.Tensor, *, add: bool, scale: float = 1.0) -> torch.Tensor:
    """What torch makes of the same, as a new tensor."""
    value = gradient.float() * scale
    return (home.float() + value if add else value).to(home.dtype)


def _case(home: torch.dtype, gradient: torch.dtype, add: bool, scale: float) -> KernelCase:
    def make(n: int, device: torch.device) -> Inputs:
        return {"home": [numbers(n, 1, home, device)], "gradient": [numbers(n, 2, gradient, device)]}

    def run(launcher: Launcher, inputs: Inputs) -> Sequence[torch.Tensor]:
        accumulate(launcher, inputs["home"][0], inputs["gradient"][0], add=add, scale=scale)
        return inputs["home"]

    return KernelCase(
        name=f"{'accumulate' if add else 'store'}_{FLOATS[home]}_{FLOATS[gradient]}",
        make=make,
        run=run,
        reference=lambda inputs: [reference(inputs["home"][0], inputs["gradient"][0], add=add, scale=scale)],
        moved=lambda n: n * (home.itemsize * (2 if add else 1) + gradient.itemsize),
    )


CASES = (
    *(_case(home, gradient, True, 0.3) for home, gradient in BY_DTYPES),
    _case(torch.float32, torch.bfloat16, False, 1.0),
    _case(torch.bfloat16, torch.bfloat16, False, 1.0),
)
