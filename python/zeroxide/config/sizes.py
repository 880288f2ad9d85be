"""Byte sizes as people write them: `2GiB`, `500MB`, `1.5G`, or a plain count of bytes."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["format_bytes", "parse_bytes"]

_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<prefix>[KMGTP]?)(?P<suffix>I?B)?", re.ASCII | re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """Return the number of bytes that `value` stands for.

    `KiB MiB GiB TiB PiB` are powers of 1024 and `KB MB GB TB PB` powers of 1000; a single letter is binary, as `ulimit`
    and container runtimes read it. A fraction of a byte is cut off. Raises `ValueError` with what was expected.
    """
    if isinstance(value, bool):
        raise ValueError("a size in bytes such as 2147483648 or '2GiB'")
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) and len(value) <= 64 else None
    if match is None or ((match["suffix"] or "").upper() == "IB" and not match["prefix"]):
        raise ValueError("a size in bytes such as 2147483648 or '2GiB'")
    table = _DECIMAL if (match["suffix"] or "").upper() == "B" else _BINARY
    return int(Fraction(match["number"]) * table[match["prefix"].upper()])


def format_bytes(count: int) -> str:
    """Return `count` in the largest binary unit that leaves at least 1, with two decimals at most: `1.5 GiB`."""
    value, unit = float(count), "bytes"
    for prefix in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, prefix
    return f"{value:.2f}".rstrip("0").rstrip(".") + f" {unit}"
