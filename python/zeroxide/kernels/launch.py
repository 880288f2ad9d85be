"""What a kernel is to those who launch it, and what launches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from zeroxide import _core
from zeroxide.errors import DeviceError
from zeroxide.kernels.shipped import machine_code

__all__ = ["CudaLauncher", "Kernel", "Launcher", "Loader"]


@dataclass(frozen=True)
class Kernel:
    """An entry point of a file in `cuda/kernels/`.

    source: the file's name without `.cu`. entry: the name of its function. threads: lanes of a block.
    shared_bytes: dynamic shared memory of a block, in bytes.
    """

    source: str
    entry: str
    threads: int
    shared_bytes: int = 0


class Launcher(Protocol):
    """Runs kernels on the memory that their arguments point to."""

    def launch(self, kernel: Kernel, blocks: int, args: bytes) -> None:
        """Starts `kernel` on a grid of `blocks` blocks; `args` is its one argument, a struct as it lies in memory."""


class Loader(Launcher, Protocol):
    """A launcher that can tell ahead whether a kernel can run."""

    def load(self, kernel: Kernel) -> object:
        """Makes `kernel` ready. Raises DeviceError where it cannot be made or loaded."""


class CudaLauncher:
    """Runs kernels on one CUDA device, in torch's context of it and on the stream that is torch's current one.

    A kernel's code comes with zeroxide or out of the cache, or is compiled when it is launched first. Memory that a
    kernel uses is torch's to keep for it as for torch's own: a tensor that another stream made needs `record_stream`.
    """

    def __init__(self, device: torch.device | None = None, *, library: str = _core.CUDA_DRIVER) -> None:
        """Launches on `device`, by default torch's current one, by the driver that the loader knows as `library`.

        Raises DeviceError where there is no driver, no such device, or a torch that is built without CUDA.
        """
        problem = _core.probe_cuda(library).problem
        if problem is not None:
            raise DeviceError(problem)
        if not torch.cuda.is_available():
            raise DeviceError(
                "this torch does not see the CUDA device that the driver shows: install a CUDA build of it"
            )
        number = device.index if device is not None and device.index is not None else torch.cuda.current_device()
        self.context = _core.CudaContext(number, library)
        self._compiled: dict[str, _core.KeptCubin] = {}
        self._loaded: dict[Kernel, _core.CudaKernel] = {}

    @property
    def device(self) -> torch.device:
        """Where kernels run."""
        return torch.device("cuda", self.context.device)

    def load(self, kernel: Kernel) -> _core.CudaKernel:
        """The kernel, compiled and loaded. Raises DeviceError where it cannot be made or loaded."""
        loaded = self._loaded.get(kernel)
        if loaded is None:
            kept = self._compiled.get(kernel.source)
            if kept is None:
                kept = machine_code(kernel.source, self.context.architecture, self.context.driver_version)
                self._compiled[kernel.source] = kept
            loaded = self.context.load(f"{kernel.source}.cu", kept, kernel.entry)
            self._loaded[kernel] = loaded
        return loaded

    def launch(self, kernel: Kernel, blocks: int, args: bytes) -> None:
        """Starts `kernel` behind all that the current stream has to do.

        Raises DeviceError where torch's current device is another one, where the argument has not the size of the
        kernel's, where the device refuses the grid, and where it is lost.
        """
        current = torch.cuda.current_device()
        if current != self.context.device:
            raise DeviceError(
                f"kernel {kernel.entry} is launched on device {self.context.device}, and torch's current device is "
                f"{current}: launch under torch.cuda.device({self.context.device})"
            )
        stream = torch.cuda.current_stream().cuda_stream
        self.load(kernel).launch(blocks, kernel.threads, kernel.shared_bytes, stream, args)
