"""Mutants of files and of arguments: deterministic, from a small corpus that every run begins with.

An input that was once not refused as it should be is kept in `corpus/`, as `refused-...`.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).with_name("corpus")
SECONDS = float(os.environ.get("ZX_FUZZ_SECONDS", "600"))
"""Of each slow test."""
MOST_BYTES = 256 << 20
"""By how much the process may grow: no input of a few KiB needs so much."""

WORDS = [b"-1", b"18446744073709551616", b"1e400", b"NaN", b"null", b"[[[[[[[[", b'{"a":', b"\\ud800", b"\xff\xfe"]
WORDS += [b"\n", b"\0", b"[2,0]", b"0.5", b"true", b'""', b"9" * 5000]
"""Pieces that parsers of such text stumble over."""
VALUES = [None, True, -1, 0, 1, 2, 7, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 2**80, 0.5, 1e300]
VALUES += [float("nan"), float("inf"), "", "a", "\n", "\ud800", "F32", "adam", "weights", [], {}, [0], [[]], [2, 3]]


def bytes_mutated(data: bytes, draw: random.Random) -> bytes:
    """Bits, pieces and digits changed, moved and lost."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(found))
        end = min(at + draw.randint(0, 24), len(found))
        kind = draw.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            del found[at:end]
        elif kind == 3:
            found[at:end] = draw.choice(WORDS)
        elif kind == 4:
            to = draw.randint(0, len(found))
            found[to:to] = found[at:end]
        else:
            found[at : at + 1] = draw.choice(b"0123456789").to_bytes()
    return bytes(found)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [each for key, below in inner for each in _places(below, (*path, key))]


def value_mutated(value: Any, draw: random.Random) -> Any:
    """Leaves and branches of plain data replaced, removed, doubled, or exchanged for other ones of the same data."""
    found = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = _places(found)
        if not places:
            break
        *path, key = draw.choice(places)
        holder = found
        for each in path:
            holder = holder[each]
        kind = draw.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 2:
            other = found
            for each in draw.choice(places):
                other = other[each]
            holder[key] = copy.deepcopy(other)
        elif kind == 3 and isinstance(holder[key], int):
            holder[key] += draw.choice([-1, 1, 2, 1 << 32])
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return found


def fuzz(kind: str, seconds: float, mutate: Callable[[bytes, random.Random], Any], look: Callable[..., None]) -> int:
    """Has `look` see each input of a corpus, and mutants for so long: it is given the input that one came from, and the
    mutant, or None. Returns the number of mutants."""
    paths = sorted((CORPUS / kind).iterdir())
    inputs = [path.read_bytes() for path in paths if not path.name.startswith("refused")]
    assert inputs, f"no inputs of {kind}"
    for each in inputs:
        look(each, None)
    for path in paths:
        look(inputs[0], path.read_bytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    draw, tried, end = random.Random(0x5EED), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        original = draw.choice(inputs)
        mutant = mutate(original, draw)
        try:
            look(original, mutant)
        except BaseException as error:
            error.add_note(f"{kind} {tried}: {mutant!r}"[:20_000])
            raise
        tried += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        assert grown <= MOST_BYTES, f"{kind} {tried} took {grown} bytes: {mutant!r}"[:20_000]
    print(f"{tried} mutants of {kind}")
    return tried


def one_line(error: Exception) -> str:
    """What a user reads of an error, which must be one line that can be printed."""
    line = str(error)
    assert 0 < len(line) < 1000, line[:3000]
    assert "\n" not in line, repr(line)
    line.encode()
    return line


def as_json(data: bytes) -> Any:
    """The plain data of an input, which may be no JSON at all."""
    try:
        return json.loads(data)
    except ValueError:
        return None
