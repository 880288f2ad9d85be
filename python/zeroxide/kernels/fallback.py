"""What takes the place of kernels that cannot run: their wrappers compute by torch."""

from __future__ import annotations

import functools
import warnings

import torch

from zeroxide.errors import DeviceError
from zeroxide.kernels.launch import Kernel, Launcher, Loader

__all__ = ["KernelsOrTorch", "by_torch"]


class KernelsOrTorch:
    """Launches the kernels that a device can run; wrappers compute by torch what they find without a kernel here.

    The first time for each reason a RuntimeWarning names it. Results have the kernel's bits where its `KernelCase` has
    no tolerance. Optimizer steps are computed by the CPU, on copies in host memory; all else on the tensors' device.
    """

    def __init__(self, device: torch.device, launcher: Loader | None, problem: str = "") -> None:
        """launcher: None where no kernel can run on `device`. problem: why, in one line."""
        self._device = device
        self._launcher = launcher
        self._problem = problem
        self._runs: dict[Kernel, bool] = {}
        if launcher is None:
            self._tell(problem)

    def runs(self, kernel: Kernel) -> bool:
        """Whether there is this kernel. It is made and loaded where that has not been done."""
        if self._launcher is None:
            return False
        found = self._runs.get(kernel)
        if found is None:
            try:
                self._launcher.load(kernel)
                found = True
            except DeviceError as error:
                self._tell(str(error))
                found = False
            self._runs[kernel] = found
        return found

    def _tell(self, problem: str) -> None:
        _warn(f"torch computes on {self._device} what kernels would, in more time and memory: {problem}")

    def launch(self, kernel: Kernel, blocks: int, args: bytes) -> None:
        """See `Launcher`. Raises DeviceError where there is no such kernel."""
        if self._launcher is None:
            raise DeviceError(f"kernel {kernel.entry} cannot run on {self._device}: {self._problem}")
        self._launcher.launch(kernel, blocks, args)


def by_torch(launcher: Launcher, *kernels: Kernel) -> bool:
    """Whether a wrapper that needs `kernels` is to compute by torch."""
    return isinstance(launcher, KernelsOrTorch) and not all(launcher.runs(kernel) for kernel in kernels)


@functools.cache
def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)
