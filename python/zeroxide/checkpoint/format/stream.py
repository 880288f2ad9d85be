"""Writing a safetensors file tensor by tensor, with all shapes known and no tensor whole in memory.

The format (github.com/huggingface/safetensors): an 8-byte little-endian length, that many bytes of JSON with dtype,
shape and [begin, end) of each tensor, then the bytes of the tensors back to back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from zeroxide.checkpoint.format.durable_file import DurableFile, write_all
from zeroxide.device.placement import of_buffer

__all__ = [
    "DTYPES",
    "PACKED",
    "SAVED",
    "SCATTER_PLACES",
    "Entry",
    "StreamWriter",
    "bytes_of",
    "digest",
    "dtype_name",
    "read_into",
    "read_scattered",
    "saved_name",
    "stored_dtype",
    "write_all",
]

HEADER_ALIGN = 8
DIGEST_BYTES = 16
SCATTER_PLACES = 1024
"""Places in memory that one call fills (IOV_MAX of Linux)."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
}
"""dtypes by the names that safetensors files use."""

PACKED = {torch.float4_e2m1fn_x2: 2}
"""Elements that a file counts for one of torch's; along the last dimension."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SAVED = DTYPES | {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and dtype not in _NAMES
}
"""dtypes by the names that manifests use: torch's where safetensors files have none, and the file holds bytes."""


def dtype_name(dtype: torch.dtype) -> str | None:
    """The name of `dtype` in a safetensors file; None where there is none."""
    return _NAMES.get(dtype)


def saved_name(dtype: torch.dtype) -> str:
    """The name of `dtype` in a manifest."""
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a file of a checkpoint holds elements of `dtype` as: themselves, or bytes."""
    return dtype if dtype in _NAMES else torch.uint8


def digest() -> hashlib.blake2b:
    """A fresh checksum, as manifests hold it of themselves: BLAKE2b of 16 bytes."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return prod(self.shape) * self.dtype.itemsize


def header(entries: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the first tensor starts at a multiple of 8."""
    described: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for entry in entries:
        described[entry.key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": _file_shape(entry),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGN)
    return len(text).to_bytes(8, "little") + text


def _file_shape(entry: Entry) -> list[int]:
    shape = list(entry.shape)
    if entry.dtype in PACKED:
        shape = [*shape[:-1], (shape[-1] if shape else 1) * PACKED[entry.dtype]]
    return shape


def read_into(descriptor: int, into: memoryview, start: int) -> int:
    """Fills `into` from byte `start` of a file, however many calls that takes. Raises OSError.

    Returns the bytes that were read: fewer only where the file ends before.
    """
    return read_scattered(descriptor, [into], start)


def read_scattered(descriptor: int, into: Sequence[memoryview], start: int) -> int:
    """As `read_into`, for bytes that follow one another in the file and go to several places, at most SCATTER_PLACES.

    Places are filled in their order, so one that is given twice has the bytes of the second time.
    """
    left, done = [each for each in into if each.nbytes], 0
    while left:
        count = os.preadv(descriptor, left, start + done)
        if not count:
            break
        done += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if count:
            left[0] = left[0][count:]
    return done


class StreamWriter:
    """A new safetensors file, given as pieces of its tensors in the order of `entries`.

    Used as a context manager, it closes the file in any case; only `finish` makes it complete.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> None:
        keys = {entry.key for entry in entries}
        assert len(keys) == len(entries), "keys of one file are distinct"
        # Readers view each tensor in place, so each must start at a multiple of its element size.
        widths = [entry.dtype.itemsize for entry in entries]
        assert widths == sorted(widths, reverse=True), "wider elements come first"
        self.path = path
        self._left = [(entry, entry.bytes) for entry in entries]
        self._left.reverse()
        start = header(entries, metadata)
        self._file = DurableFile(path, len(start) + sum(entry.bytes for entry in entries))
        try:
            self._file.write(of_buffer(bytearray(start), torch.uint8))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, values: torch.Tensor) -> None:
        """The next elements of the present tensor: contiguous, in host memory, of its dtype, not beyond its end.

        A tensor of bytes takes elements of any dtype.
        """
        if not values.numel():
            return
        while self._left and not self._left[-1][1]:
            self._left.pop()
        assert self._left, "no tensor is left to write"
        entry, left = self._left[-1]
        assert entry.dtype in (values.dtype, torch.uint8), f"{entry.key} takes {entry.dtype}"
        assert values.nbytes <= left, f"{entry.key} has {left} bytes left"
        self._file.write(values.detach().view(-1).view(torch.uint8))
        self._left[-1] = (entry, left - values.nbytes)

    @property
    def bytes(self) -> int:
        """Bytes that were written so far."""
        return self._file.bytes

    def finish(self) -> str:
        """Makes the file durable; returns its checksum, CRC-64/NVME in hex. Every tensor must be complete."""
        missing = [entry.key for entry, left in self._left if left]
        assert not missing, f"{missing[-1]} is not complete"
        return self._file.finish()

    def close(self) -> None:
        """Closes the file, complete or not. Idempotent."""
        self._file.close()
