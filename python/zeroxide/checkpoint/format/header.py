"""What stands where in a safetensors file. Headers are judged by the reference implementation of the format.

It refuses what a reader of one's own easily takes: holes, overlaps, trailing bytes, numbers that overflow, odd JSON.
It is given the header over a file of zeros of the same length: mapping the file itself would make a disk that fails,
or a file that is cut meanwhile, a signal that ends the process.

Format: eight bytes of header length (little-endian), that many bytes of JSON (name -> dtype, shape, data_offsets
relative to the end of the header), then the data.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from zeroxide.checkpoint.format.stream import read_into

__all__ = ["StoredTensor", "read_header"]

MAX_HEADER_BYTES = 100_000_000
"""As in the reference implementation."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: `dtype` in the format's words, and its bytes, row-major, `begin .. end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(descriptor: int) -> dict[str, StoredTensor]:
    """The tensors of an open file. Raises ValueError, in one line, when it is no safetensors file, and OSError."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"it has {size} bytes, and a header of {length} is announced")
    raw = _read(descriptor, 8 + length)
    _check(raw, size)
    described = json.loads(raw[8:])
    described.pop("__metadata__", None)
    start = len(raw)
    return {
        name: StoredTensor(
            entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0], start + entry["data_offsets"][1]
        )
        for name, entry in described.items()
    }


def _read(descriptor: int, count: int) -> bytes:
    found = bytearray(count)
    read = read_into(descriptor, memoryview(found), 0)
    if read < count:
        raise ValueError(f"it ends at byte {read}, within its header")
    return bytes(found)


def _check(raw: bytes, size: int) -> None:
    stand_in = os.memfd_create("zeroxide-header", os.MFD_CLOEXEC)
    try:
        with open(stand_in, "wb", closefd=False) as file:
            file.write(raw)
        os.ftruncate(stand_in, size)
        with safe_open(f"/proc/self/fd/{stand_in}", framework="numpy"):
            pass
    except SafetensorError as error:
        line = " ".join(str(error).split()).removeprefix("Error while deserializing header: ")
        raise ValueError(line[:200]) from None
    finally:
        os.close(stand_in)
