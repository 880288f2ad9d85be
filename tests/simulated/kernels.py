"""Kernels on the simulated device: the sources of `cuda/`, built for the host as `tests/cuda` builds them, and played
on device memory by the thread that launches them, as operators are.

What a kernel touches follows from its argument, and the checker is told of it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from simulated.build import CACHE
from zeroxide.errors import DeviceError
from zeroxide.kernels import Kernel, accumulate, norm, update
from zeroxide.kernels.step import ROUNDING

sys.path.append(str(Path(__file__).parents[1] / "cuda"))

from emulated import CUDA, FLAGS, Builds, Emulator, processor_flags

SOURCES = ("adam", "lion", "adagrad", "sgd", "norm", "accumulate")
Touch = tuple[int, int, bool]
SIZES = {"f32": 4, "bf16": 2, "f16": 2}
LIVE = {"fp32": 4, "master_bf16": 2, "master_f16": 2, "split": 2, "split_bf16": 2, "compact": 2}
EXACT = {"fp32": 0, "master_bf16": 4, "master_f16": 4, "split": 2, "split_bf16": 2, "compact": 1}
GRADS = (4, 2, 2)
"""Bytes of an element, in the order of `zx::Dtype`."""


@functools.cache
def built() -> dict[str, Path]:
    """The sources as shared objects, built once for each state of them; one process builds, others wait."""
    known = hashlib.sha256(repr((FLAGS, processor_flags())).encode())
    for path in sorted(each for each in CUDA.rglob("*") if each.is_file()):
        known.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = CACHE / f"kernels-{known.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            for source in SOURCES:
                Builds(folder).build(source)
            done.touch()
        return {source: next(folder.glob(f"{source}-*.so")) for source in SOURCES}


def _of_accumulate(kernel: Kernel, given: bytes) -> list[Touch]:
    args = accumulate._Arguments.from_buffer_copy(given)
    home, gradient = (SIZES[each] for each in kernel.entry.split("_")[2:])
    return [
        (args.home, args.home + args.elements * home, True),
        (args.gradient, args.gradient + args.elements * gradient, False),
    ]


def _of_update(kernel: Kernel, given: bytes) -> list[Touch]:
    codec = kernel.entry.split("_", 2)[2]
    kinds = update._ROUNDING_ARGUMENTS if codec in ROUNDING else update._ARGUMENTS
    args: Any = kinds[kernel.source].from_buffer_copy(given)
    elements = args.elements
    blocks = -(-elements // 64) * 66
    moment = {"compact": blocks, "split_bf16": 2 * elements}.get(codec, 4 * elements)
    places = (
        (args.live, elements * LIVE[codec], True),
        (args.exact, elements * EXACT[codec], True),
        (args.first, moment, True),
        (args.second, moment, True),
        (args.grad, elements * GRADS[args.grad_dtype], False),
    )
    return [(at, at + size, writes) for at, size, writes in places if at]


def _of_norm(kernel: Kernel, given: bytes) -> list[Touch]:
    kind = {"chunks": norm._Chunks, "pieces": norm._Pieces, "total": norm._Total}[kernel.entry.split("_")[2]]
    args: Any = kind.from_buffer_copy(given)
    table = (args.segments, args.segments + 32 * args.count, False)
    if kind is norm._Chunks:
        size = SIZES[kernel.entry.rsplit("_", 1)[1]]
        rows = struct.iter_unpack("<4q", torch.sim.peek(args.segments, 32 * args.count))
        inputs = [(at, at + numel * size, False) for at, numel, _, _ in rows]
        return [table, *inputs, (args.chunk_sums, args.chunk_sums + 8 * args.chunks, True)]
    if kind is norm._Pieces:
        chunks = (args.chunk_sums, args.chunk_sums + 8 * args.chunks, False)
        return [table, chunks, (args.piece_sums, args.piece_sums + 8 * args.pieces, True)]
    return [
        table,
        (args.piece_sums, args.piece_sums + 8 * args.pieces, False),
        (args.segment_sums, args.segment_sums + 8 * args.count, True),
        (args.result, args.result + 16, True),
        (args.nonfinite, args.nonfinite + 8, True),
    ]


TOUCHED: dict[str, Callable[[Kernel, bytes], list[Touch]]] = {
    "accumulate": _of_accumulate,
    "norm": _of_norm,
    **dict.fromkeys(("adam", "lion", "adagrad", "sgd"), _of_update),
}


class PlayedKernels:
    """A launcher for the simulated device. `launched` lists the kernels that it has played, by name."""

    def __init__(self, device: torch.device) -> None:
        self._emulator = Emulator(built())
        self._device = device
        self.launched: list[str] = []

    def load(self, kernel: Kernel) -> None:
        """See `Loader`. All of them are built."""

    def launch(self, kernel: Kernel, blocks: int, args: bytes) -> None:
        """See `Launcher`."""
        if torch.accelerator.current_device_index() != self._device.index:
            # As CUDA's launcher.
            raise DeviceError(
                f"kernel {kernel.entry} is launched on {self._device}, which is not torch's current device"
            )
        self.launched.append(kernel.entry)
        with torch.sim.kernel(kernel.entry, TOUCHED[kernel.source](kernel, args)):
            self._emulator.launch(kernel, blocks, args)
