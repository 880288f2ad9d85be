"""The file that activations wait in: any order of taking and giving back, and disks that fail."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroxide.errors import StorageError
from zeroxide.zero.activation_file import BUFFERS, ActivationFile

ROW = 8192
"""Bytes that are appended at once: half of a segment."""
MEMORY = BUFFERS * 2 * ROW


def filled(
    folder: Path, rows: int, reserved: int | None = None
) -> tuple[ActivationFile, list[Any], list[torch.Tensor]]:
    """A file to which so many rows were appended, two a segment."""
    file = ActivationFile(folder, MEMORY, reserved, "threads", 4)
    values = [torch.randint(0, 256, (ROW,), dtype=torch.uint8) for _ in range(rows)]
    return file, [file.append(each) for each in values], values


def test_a_flipped_bit_is_found(tmp_path):
    """Catches: a checksum that is not compared."""
    file, pieces, values = filled(tmp_path, 20)
    target = torch.empty(ROW, dtype=torch.uint8)
    file.fetch(pieces[3], target)
    assert torch.equal(target, values[3])
    with Path(f"/proc/self/fd/{file._descriptor}").open("r+b") as raw:
        raw.seek(5)
        flipped = bytes([raw.read(1)[0] ^ 1])
        raw.seek(5)
        raw.write(flipped)
    with pytest.raises(StorageError, match="another checksum"):
        file.fetch(pieces[1], target)
    file.fetch(pieces[5], target)
    assert torch.equal(target, values[5]), "the rest is as it was"
    file.close()


def test_a_short_file_is_found(tmp_path):
    """Catches: a length that is not looked at."""
    file, pieces, _ = filled(tmp_path, 20)
    for buffer in file._buffers:
        # A write that is still under way would make the file long again.
        buffer.queue.wait()
    os.ftruncate(file._descriptor, ROW)
    with pytest.raises(StorageError, match=r"activations in .* could not be read"):
        file.fetch(pieces[1], torch.empty(ROW, dtype=torch.uint8))
    file.close()


def test_a_write_that_fails_later_is_told(tmp_path):
    """The system refuses bytes beyond a limit, asynchronously. Catches: a result that nobody looks at."""
    file = ActivationFile(tmp_path, MEMORY, 20 * ROW, "threads", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROW, hard))
    try:
        with pytest.raises(StorageError, match=r"activations in .* could not be written"):
            # Further buffers than there are: each is waited for.
            file.append(torch.zeros(16 * ROW, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
        file.close()


def test_any_order_of_taking_and_giving_back(tmp_path):
    """Catches: a place that two segments have, a buffer that is another's, what is read ahead into one in use."""
    file = ActivationFile(tmp_path, MEMORY, None, "auto", 4)
    random = torch.Generator().manual_seed(11)
    kept: dict[int, tuple[Any, torch.Tensor]] = {}
    for number in range(600):
        size = int(torch.randint(1, 3 * 2 * ROW, (), generator=random))
        values = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=random)
        kept[number] = file.append(values), values
        while len(kept) > 30 or (kept and torch.rand((), generator=random) < 0.45):
            at = list(kept)[int(torch.randint(0, len(kept), (), generator=random))]
            pieces, values = kept.pop(at)
            target = torch.empty_like(values)
            file.fetch(pieces, target)
            file.read_ahead(pieces[0], 2)
            assert torch.equal(target, values)
            file.release(pieces)
    for pieces, _ in kept.values():
        file.release(pieces)
    assert len(file._segments) <= 1, "one fills"
    assert file.most <= 33 * 6 * ROW
    file.close()
