"""The launcher of a device, by the kind of device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zeroxide.errors import DeviceError
from zeroxide.kernels.launch import CudaLauncher, Launcher
from zeroxide.kernels.norm import TOTAL

__all__ = ["LAUNCHERS", "make_launcher"]


def _cuda(device: torch.device) -> CudaLauncher:
    launcher = CudaLauncher(device)
    # Here, and not in the middle of a step: what stops one kernel from being made stops all.
    launcher.load(TOTAL)
    return launcher


LAUNCHERS: dict[str, Callable[[torch.device], Launcher]] = {"cuda": _cuda}
"""What makes a launcher for a device, by its kind."""


def make_launcher(device: torch.device) -> Launcher:
    """Raises DeviceError, in one line, where kernels cannot run on the device, or cannot be made for it."""
    make = LAUNCHERS.get(device.type)
    if make is None:
        raise DeviceError(f"there are no kernels for {device}", device=device.index)
    return make(device)
