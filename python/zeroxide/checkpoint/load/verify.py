"""The checksum of a whole file, in the way that its manifest has it."""

from __future__ import annotations

import hashlib

import torch

from zeroxide import _core
from zeroxide.checkpoint.format.manifest import SavedFile
from zeroxide.checkpoint.format.stream import bytes_of, digest, read_into
from zeroxide.device.placement import HOST, spec

__all__ = ["checksums"]

PART_BYTES = 1 << 20
"""What is read at a time."""


def checksums(descriptor: int, saved: SavedFile) -> tuple[str, str]:
    """The checksum of an open file as it should be and as it is, in hex. Raises OSError."""
    if saved.crc64nvme is not None:
        return saved.crc64nvme, _crc64nvme(descriptor)
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        return str(saved.blake2b), hashlib.file_digest(file, digest).hexdigest()


def _crc64nvme(descriptor: int) -> str:
    made, memory, at = _core.FileChecksum(), torch.empty(PART_BYTES, dtype=torch.uint8, device=HOST), 0
    while count := read_into(descriptor, bytes_of(memory), at):
        made.update(spec(memory[:count]))
        at += count
    return made.hexdigest()
