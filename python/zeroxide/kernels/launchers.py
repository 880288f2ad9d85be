"""The launcher of a device, by the kind of device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zeroxide.errors import DeviceError
from zeroxide.kernels.fallback import KernelsOrTorch
from zeroxide.kernels.launch import CudaLauncher, Launcher, Loader
from zeroxide.kernels.norm import TOTAL

__all__ = ["LAUNCHERS", "launcher", "make_launcher"]

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
