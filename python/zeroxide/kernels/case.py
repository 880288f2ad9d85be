"""What a test or a benchmark needs of a kernel to run it on any device and to compare it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from zeroxide.kernels.launch import Launcher

__all__ = ["Inputs", "KernelCase", "Outputs", "numbers"]

Inputs = Mapping[str, Sequence[torch.Tensor]]
Outputs = Sequence[torch.Tensor]


REPEATED = 1 << 20


def numbers(n: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`n` normally distributed numbers, the same on every device; after 2^20 of them they come again."""
    drawn = torch.randn(min(n, REPEATED), generator=torch.Generator().manual_seed(seed))
    there = drawn.to(dtype).to(device)
    return there if n <= REPEATED else there.repeat(-(-n // REPEATED))[:n].contiguous()


@dataclass(frozen=True)
class KernelCase:
    """One kernel with inputs for it.

    name: unique. make: inputs of about `n` elements on a device, always the same. run: the kernel, which may change its
    inputs; gives new tensors, or those that it changed. reference: the same without the kernel and without changing
    anything. moved: bytes that the kernel at least reads and writes for `n` elements. tolerance: by how much an output
    may differ, relative to the largest magnitude of the reference's; 0 where the bits are the same, every NaN being
    equal to every other.
    """

    name: str
    make: Callable[[int, torch.device], Inputs]
    run: Callable[[Launcher, Inputs], Outputs]
    reference: Callable[[Inputs], Outputs]
    moved: Callable[[int], int]
    tolerance: float = 0.0
