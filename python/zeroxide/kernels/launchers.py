"""The launcher of a device, by the kind of device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from zeroxide.errors import DeviceError
from zeroxide.kernels.fallback import KernelsOrTorch, by_torch
from zeroxide.kernels.launch import CudaLauncher, Kernel, Launcher, Loader
from zeroxide.kernels.norm import TOTAL

__all__ = ["LAUNCHERS", "kernels_for", "launcher", "launcher_of", "make_launcher"]

LAUNCHERS: dict[str, Callable[[torch.device], Loader]] = {"cuda": CudaLauncher}
"""What makes a launcher for a device, by its kind."""


def make_launcher(device: torch.device) -> Loader:
    """Raises DeviceError, in one line, where kernels cannot run on the device, or cannot be made for it."""
    make = LAUNCHERS.get(device.type)
    if make is None:
        raise DeviceError(f"there are no kernels for {device}", device=device.index)
    made = make(device)
    # Here, and not in the middle of a step: what stops one kernel from being made stops all.
    made.load(TOTAL)
    return made


def launcher(device: torch.device) -> Launcher:
    """What the wrappers of `zeroxide.kernels` take for tensors of `device`.

    It starts kernels where they can run, out of what came with zeroxide or by NVRTC. Elsewhere (no driver, no compiler
    or one that does not know the device, a device that is not CUDA's) wrappers compute by torch with it, and the first
    time for each reason a RuntimeWarning names it.
    """
    try:
        return KernelsOrTorch(device, make_launcher(device))
    except DeviceError as error:
        return KernelsOrTorch(device, None, str(error))


@cache
def launcher_of(device: torch.device) -> Launcher:
    """`launcher(device)`, the same one for everybody who asks."""
    return launcher(device)


def kernels_for(tensor: torch.Tensor, *kernels: Kernel) -> Launcher | None:
    """What starts `kernels` on the tensor's memory, for those who have a way of their own without them: None where they
    are to take it.

    That is in host memory and on devices of a kind that has no kernels; where they cannot be made, which a
    RuntimeWarning names once; while torch.compile traces, which sees operators alone; and for tensors of a class of
    their own, which may have no memory.
    """
    device = tensor.device
    if device.type not in LAUNCHERS or torch.compiler.is_compiling():
        return None
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return None
    made = launcher_of(device)
    return None if by_torch(made, *kernels) else made
