"""Copies of many tensors from one dtype to another in one launch: `cuda/kernels/cast.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p

import torch

from zeroxide.device.placement import address, addresses
from zeroxide.errors import TensorError
from zeroxide.kernels.arguments import FLOATS, blocks_for, check, check_alike, table
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.fallback import by_torch
from zeroxide.kernels.launch import Kernel, Launcher

__all__ = ["CASES", "KERNELS", "cast", "pack", "reference", "unpack"]

THREADS = 256
TILE = 8192
FIRST_PACK = 7
"""The most elements by which tiles begin before their target, at an aligned address."""

BY_DTYPES = {
    (source, target): Kernel("cast", f"zx_cast_{name}_{other}", THREADS)
    for source, name in FLOATS.items()
    for target, other in FLOATS.items()
}
KERNELS = tuple(BY_DTYPES.values())


class _Arguments(Structure):
    _fields_ = (("segments", c_void_p), ("count", c_int64), ("tiles", c_int64))


def cast(launcher: Launcher, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Writes the values of `sources` to `targets`, one to one; rounded to nearest, ties to even, as torch casts.

    Sources are contiguous and of one dtype, and so are targets, each with as many elements as its source; dtypes are
    fp32, bf16 and fp16; all are on one device. No target may overlap another tensor. Raises TensorError.
    """
    if len(sources) != len(targets):
        expected, got = f"{len(sources)} tensors", f"{len(targets)} tensors"
        raise TensorError(f"cast: targets are {got}: expected {expected}", name="targets", expected=expected, got=got)
    if not sources:
        return
    first, into = sources[0], targets[0]
    check_alike("cast", "sources", sources, first)
    check_alike("cast", "targets", targets, first)
    sizes = [source.numel() for source in sources]
    for at, (target, numel) in enumerate(zip(targets, sizes, strict=True)):
        if target.numel() != numel:
            check("cast", f"targets[{at}]", target, FLOATS, numel=numel)
    rows: list[int] = []
    tiles = 0
    for source_at, target_at, numel in zip(addresses(sources), addresses(targets), sizes, strict=True):
        if numel:
            rows += (source_at, target_at, numel, tiles)
            tiles += -(-(numel + FIRST_PACK) // TILE)
    kernel = BY_DTYPES[first.dtype, into.dtype]
    if by_torch(launcher, kernel):
        for target, values in zip(targets, reference(sources, into.dtype), strict=True):
            target.view(-1).copy_(values.view(-1))
    elif rows:
        segments = table(rows, first.device)
        args = _Arguments(address(segments), len(rows) // 4, tiles)
        launcher.launch(kernel, blocks_for(tiles, 1), bytes(args))


def pack(launcher: Launcher, tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    """Writes `tensors` one after the other to `flat`, which has as many elements as all of them. As `cast`."""
    cast(launcher, tensors, _parts(flat, tensors))


def unpack(launcher: Launcher, flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Takes a buffer that `pack` filled apart again. As `cast`."""
    cast(launcher, _parts(flat, tensors), tensors)


def _parts(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Views of the flat buffer, one for each tensor."""
    check("cast", "the flat buffer", flat, FLOATS, numel=sum(tensor.numel() for tensor in tensors))
    return torch.split(flat.view(-1), [tensor.numel() for tensor in tensors])


def reference(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """What torch casts the same to."""
    return [source.to(dtype) for source in sources]


def _case(source: torch.dtype, target: torch.dtype, way: str) -> KernelCase:
    def make(n: int, device: torch.device) -> Inputs:
        parts = [n // 3, n // 2, n - n // 3 - n // 2]
        tensors = [numbers(part, seed, source, device) for seed, part in enumerate(parts)]
        flat = torch.cat(tensors) if way == "unpack" else torch.zeros(n, device=device)
        into = [torch.zeros_like(tensor, dtype=target) for tensor in tensors]
        return {"tensors": tensors, "flat": [flat.to(source if way == "unpack" else target)], "into": into}

    def run(launcher: Launcher, inputs: Inputs) -> Sequence[torch.Tensor]:
        if way == "pack":
            pack(launcher, inputs["tensors"], inputs["flat"][0])
            return inputs["flat"]
        unpack(launcher, inputs["flat"][0], inputs["into"])
        return inputs["into"]

    def expected(inputs: Inputs) -> Sequence[torch.Tensor]:
        if way == "pack":
            return [torch.cat(reference(inputs["tensors"], target))]
        sizes = [each.numel() for each in inputs["into"]]
        return reference(torch.split(inputs["flat"][0], sizes), target)

    return KernelCase(
        name=f"{way}_{FLOATS[source]}_{FLOATS[target]}",
        make=make,
        run=run,
        reference=expected,
        moved=lambda n: n * (source.itemsize + target.itemsize),
    )


CASES = (
    *(_case(source, target, "pack") for source, target in BY_DTYPES),
    _case(torch.bfloat16, torch.bfloat16, "unpack"),
    _case(torch.bfloat16, torch.float32, "unpack"),
)
