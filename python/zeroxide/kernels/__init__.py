"""CUDA kernels, one file a family: a typed wrapper of each and what torch makes of the same.

A wrapper takes a `Launcher`, which `launcher` makes for a device, and tensors of whatever memory its kernels can reach;
where kernels cannot run it computes by torch. `ALL` has every kernel
with inputs and its reference.
"""

from zeroxide.kernels import accumulate, cast, cross_entropy, norm, permute, quantise, update, update_cases
from zeroxide.kernels.case import KernelCase
from zeroxide.kernels.launch import Kernel, Launcher
from zeroxide.kernels.launchers import launcher

__all__ = ["ALL", "KERNELS", "Kernel", "KernelCase", "Launcher", "launcher"]

ALL: tuple[KernelCase, ...] = (
    *norm.CASES,
    *update_cases.CASES,
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
