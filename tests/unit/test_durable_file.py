"""Files that are written past the page cache while their checksum is taken."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
import time

import pytest
import torch

from zeroxide import _core
from zeroxide.checkpoint.format import durable_file, mapping
from zeroxide.checkpoint.format.durable_file import ALIGN, BUFFER_BYTES, DurableFile
from zeroxide.device.placement import spec

LARGE = 3 * BUFFER_BYTES + 12_345


def data_of(size):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def checksum_of(data):
    made = _core.FileChecksum()
    made.update(spec(data))
    return made.hexdigest()


def pieces_of(data, seed):
    """The data in pieces of very different sizes, some empty and some larger than a buffer."""
    sizes = torch.Generator().manual_seed(seed)
    while data.numel():
        size = int(2 ** (24 * torch.rand((), generator=sizes))) - 1
        yield data[:size]
        data = data[size:]


def write(path, data, seed=0):
    file = DurableFile(path, data.numel())
    try:
        for piece in pieces_of(data, seed):
            # What was given may change at once.
            mine = piece.clone()
            file.write(mine)
            mine.zero_()
        assert file.bytes == data.numel()
        return file.finish()
    finally:
        file.close()
        file.close()


@pytest.fixture(autouse=True)
def nothing_left():
    """No thread and no descriptor, however it ends."""
    threads, before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_checksum_is_the_published_one():
    """The check value of CRC-64/NVME in the RevEng catalogue, in one piece and in two."""
    text = torch.frombuffer(bytearray(b"123456789"), dtype=torch.uint8)
    assert checksum_of(text) == "ae8b14860a799888"
    made, copy = _core.FileChecksum(), torch.zeros(5, dtype=torch.uint8)
    made.update(spec(text[:4]))
    made.copy(spec(text[4:]), spec(copy))
    assert made.hexdigest() == "ae8b14860a799888"
    assert bytes(copy.tolist()) == b"56789"
    for room, line in ((copy[:4], "expected room for 5 bytes, got room for 4"), (text[:5], "share memory")):
        with pytest.raises(ValueError, match=line):
            made.copy(spec(text[4:]), spec(room))
    assert made.hexdigest() == "ae8b14860a799888"


@pytest.mark.parametrize("size", [0, 1, ALIGN, 2 * BUFFER_BYTES, 2 * BUFFER_BYTES + 1, 3 * BUFFER_BYTES, LARGE])
def test_a_file_has_what_was_written_in_order(tmp_path, size):
    """Catches: buffers written in another order or twice, the last page left out or in the wrong place, a buffer filled
    while it is being written."""
    data = data_of(size)
    for seed in (0, 1):
        found = write(tmp_path / str(seed), data, seed)
        assert (tmp_path / str(seed)).read_bytes() == data.numpy().tobytes()
        assert found == checksum_of(data)


def test_a_slow_disk_is_waited_for(tmp_path, monkeypatch):
    """Catches: a buffer that is filled again before it was written."""
    real = os.write

    def slow(*args):
        time.sleep(0.02)
        return real(*args)

    monkeypatch.setattr(os, "write", slow)
    monkeypatch.setattr(durable_file, "BUFFER_BYTES", 4 * ALIGN)
    data = data_of(40 * ALIGN + 5)
    assert write(tmp_path / "file", data) == checksum_of(data)
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


def test_large_files_pass_the_page_cache_by(tmp_path, monkeypatch):
    direct = []
    real = os.open

    def opened(path, flags, *more):
        direct.append(bool(flags & os.O_DIRECT))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", opened)
    write(tmp_path / "large", data_of(LARGE))
    write(tmp_path / "small", data_of(1000))
    assert direct == [False, True, False]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_file_system_without_direct_writes_is_no_error(tmp_path, monkeypatch, code):
    """Any other error is one."""
    real = os.open

    def refusing(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    data = data_of(LARGE)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            write(tmp_path / "file", data)
    else:
        assert write(tmp_path / "file", data) == checksum_of(data)
        assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


@pytest.mark.parametrize("most", [ALIGN, 3 * ALIGN, ALIGN + 512, 1000])
def test_short_writes_go_on_where_they_ended(tmp_path, monkeypatch, most):
    """Whole pages go on directly, and a part of one through the page cache."""
    real = os.write
    monkeypatch.setattr(durable_file, "BUFFER_BYTES", 8 * ALIGN)
    calls = []

    def short(descriptor, data):
        calls.append(len(data))
        if len(calls) % 3 == 1:
            # A part of a page does not go into a file that was opened for direct writes.
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            with open(path, "r+b", buffering=0) as file:
                at = os.lseek(descriptor, 0, os.SEEK_CUR)
                file.seek(at)
                written = file.write(data[:most])
            os.lseek(descriptor, written, os.SEEK_CUR)
            return written
        return real(descriptor, data)

    data = data_of(50 * ALIGN + 77)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", short)
        found = write(tmp_path / "file", data)
    assert found == checksum_of(data)
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()
    assert len(calls) > 7


def test_a_disk_that_fails_is_said_at_any_write(tmp_path, monkeypatch):
    """Catches: an error of the thread that writes lost, or a wait for it that never ends."""
    real = os.write
    data, at = data_of(LARGE), 0
    while True:
        calls = itertools.count()

        def failing(*args, calls=calls, at=at):
            if next(calls) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", failing)
            code = outcome(tmp_path / str(at), data)
        if code is None:
            break
        assert code == errno.ENOSPC
        at += 1
    # Three buffers, the whole pages of the last one, and the page that is not full.
    assert at == 5


def outcome(path, data):
    try:
        write(path, data)
    except OSError as error:
        return error.errno
    return None


class WithoutHugePages(mmap.mmap):
    """A mapping of a kernel that was built without them."""

    def madvise(self, *args):
        raise OSError(errno.EINVAL, "Invalid argument")


def test_a_kernel_without_huge_pages_writes_the_same_file(tmp_path, monkeypatch):
    data = data_of(LARGE)
    monkeypatch.setattr(mapping.mmap, "mmap", WithoutHugePages)
    assert write(tmp_path / "file", data) == checksum_of(data)
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


def test_buffers_start_at_a_huge_page():
    buffer = durable_file._Buffer()
    buffer.memory.fill_(7)
    assert buffer.memory.numel() == BUFFER_BYTES
    assert buffer.memory.data_ptr() % mapping.HUGE_PAGE == 0
    assert bytes(buffer.view(BUFFER_BYTES - 3, BUFFER_BYTES)) == b"\7\7\7"
