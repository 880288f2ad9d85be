"""Which lane works on what, beyond what fits in memory here: 64-bit arithmetic in the index functions of kernels."""

from __future__ import annotations

import ctypes
import itertools

from emulated import CUDA

PROBE = """
#include "zx/index.cuh"
struct Segment { zx::i64 first; };
extern "C" zx::i64 first_item(unsigned block, unsigned threads, unsigned lane, zx::i64 each) {
    return zx::first_item(block, threads, lane, each);
}
extern "C" zx::i64 stride(unsigned blocks, unsigned threads, zx::i64 each) {
    return zx::grid_stride(blocks, threads, each);
}
extern "C" zx::i64 segment_of(const Segment *segments, zx::i64 count, zx::i64 item) {
    return zx::segment_of(segments, count, item, &Segment::first);
}
"""
INDEX = "include/zx/index.cuh"


def probe(builds, changed=None):
    made = ctypes.CDLL(str(builds.build("index_probe", {"kernels/index_probe.cu": PROBE, **(changed or {})})))
    made.first_item.argtypes = [ctypes.c_uint] * 3 + [ctypes.c_int64]
    made.stride.argtypes = [ctypes.c_uint] * 2 + [ctypes.c_int64]
    made.segment_of.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    for each in (made.first_item, made.stride, made.segment_of):
        each.restype = ctypes.c_int64
    return made


def wrong(made) -> list[tuple[int, ...]]:
    """Arguments for which the functions do not give what whole numbers come to."""
    found = []
    for block, lane, each in itertools.product((0, 7, 2**23 - 1, 2**31 - 2), (0, 255), (1, 8)):
        if made.first_item(block, 256, lane, each) != (block * 256 + lane) * each:
            found.append((block, lane, each))
        if made.stride(block, 256, each) != block * 256 * each:
            found.append((block, each))
    return found


def test_indices_pass_the_largest_32_bit_number(builds):
    """Catches: one product that is taken in 32 bits. Both such mistakes are made here, too."""
    assert wrong(probe(builds)) == []
    text = (CUDA / INDEX).read_text()
    for old, new in (
        ("(static_cast<i64>(block) * threads + lane) * each", "static_cast<i64>(block * threads + lane) * each"),
        ("static_cast<i64>(blocks) * threads * each", "static_cast<i64>(blocks * threads) * each"),
    ):
        assert old in text
        assert wrong(probe(builds, {INDEX: text.replace(old, new)})) != []


def test_segments_of_items_past_the_largest_32_bit_number(builds):
    firsts = [0, 5, 2**31 - 1, 2**31, 2**40, 2**40, 2**40 + 1]
    segments = (ctypes.c_int64 * len(firsts))(*firsts)
    made = probe(builds)
    for item in (0, 4, 5, 2**31 - 2, 2**31 - 1, 2**31, 2**33, 2**40, 2**40 + 1, 2**50):
        expected = max(at for at, first in enumerate(firsts) if first <= item)
        assert made.segment_of(segments, len(firsts), item) == expected, item
