"""CUDA kernels, one file a family: a typed wrapper of each and what torch makes of the same.

A wrapper takes a `Launcher` and tensors of whatever memory that launcher's kernels can reach. `ALL` has every kernel
with inputs and its reference.
"""

from zeroxide.kernels import accumulate, cast, core_update, cross_entropy, norm, permute, quantise, update
from zeroxide.kernels.case import KernelCase
from zeroxide.kernels.launch import Kernel, Launcher

__all__ = ["ALL", "KERNELS", "Kernel", "KernelCase", "Launcher"]

ALL: tuple[KernelCase, ...] = (
    *norm.CASES,
    *core_update.CASES,
    *cast.CASES,
    *accumulate.CASES,
    *quantise.CASES,
    *permute.CASES,
    *cross_entropy.CASES,
)

KERNELS: tuple[Kernel, ...] = (
    *norm.KERNELS,
    *update.KERNELS,
    *cast.KERNELS,
    *accumulate.KERNELS,
    *quantise.KERNELS,
    *permute.KERNELS,
    *cross_entropy.KERNELS,
)
"""Every entry point of `cuda/kernels/`."""
