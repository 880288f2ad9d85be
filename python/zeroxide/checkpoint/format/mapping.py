"""Memory mapped by itself, which goes back to the system whatever the allocator is told to keep."""

from __future__ import annotations

import contextlib
import mmap

__all__ = ["HUGE_PAGE", "mapped"]

HUGE_PAGE = 2 << 20


def mapped(size: int) -> mmap.mmap:
    """`size` bytes of zeros in huge pages, where the kernel has them. Raises OSError where there is no memory."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
