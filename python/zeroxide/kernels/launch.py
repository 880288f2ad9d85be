"""What a kernel is to those who launch it, and what launches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Kernel", "Launcher"]


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
