"""What a directory is good for as a home of state."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from zeroxide.cli.machine.finding import Finding, broken, fine, lost
from zeroxide.cli.paths import written_path
from zeroxide.config.sizes import format_bytes
from zeroxide.errors import StorageError

__all__ = ["look"]

_BYTES, _SECONDS = 256 << 20, 1.0
"""At most so much is written, and read again, each for about so long."""
_IN_MEMORY = ("tmpfs", "ramfs", "zram")


def look(path: str) -> Iterator[Finding]:
    """Whether state can be offloaded to `path`, how it gets there and how fast."""
    from zeroxide import _core

    what = f"disk {path}"
    try:
        folder = written_path(path)
    except OSError as error:
        yield broken(what, error.strerror or str(error), "give another directory")
        return
    if not folder.is_dir():
        yield broken(
            what, "is a file" if folder.exists() else "is not there", "make the directory, or give another one"
        )
        return
    try:
        kind, free = _file_system(folder), shutil.disk_usage(folder).free
        room = min(_BYTES, free // 4)
        speed = _core.measure_disk(folder, max(room, 1 << 20), _SECONDS)
    except (StorageError, OSError) as error:
        yield broken(what, str(error), "give a directory on a local disk that this user can write to")
        return
    shown = f"{kind}, {format_bytes(free)} free; writes {speed.write / 1e9:.2f} GB/s, reads {speed.read / 1e9:.2f} GB/s"
    data = {"path": path, "file_system": kind, "free": free, "write": speed.write, "read": speed.read}
    if kind in _IN_MEMORY:
        yield lost(what, f"{shown}: that is memory, no disk", "give a directory on a disk", **data)
    else:
        yield fine(what, shown, **data)
    yield _queue(what, speed.engine)
    yield _direct(what, direct=speed.direct)


def _queue(what: str, engine: str) -> Finding:
    if engine.startswith("io_uring"):
        return fine(f"{what}: queue", engine)
    how = "set the sysctl kernel.io_uring_disabled to 0, and let the container's seccomp profile allow io_uring"
    return lost(f"{what}: queue", f"{engine}: no io_uring, which is a tenth faster and takes less of a processor", how)


def _direct(what: str, *, direct: bool) -> Finding:
    if direct:
        return fine(f"{what}: O_DIRECT", "yes", direct=True)
    found = "no: everything goes through the page cache, which competes for memory with the run"
    return lost(f"{what}: O_DIRECT", found, "give a directory on ext4 or XFS on a local disk", direct=False)


def _file_system(folder: Path) -> str:
    """The type of the file system that `folder` is on, as the kernel calls it."""
    real, best, kind = str(folder.resolve()), "", "unknown"
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            _, point, name, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, name
    return kind
