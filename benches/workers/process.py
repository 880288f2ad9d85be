"""What the kernel knows about this process: resident memory and disk bytes.

Shared by the workers of both sides, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory() -> dict[str, int]:
    """Resident bytes now (`rss`, split in `anon` and `file`) and at the highest (`peak`), from /proc/self/status."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if value.endswith("kB"):
            fields[key] = int(value.split()[0]) * 1024
    return {
        "rss": fields["VmRSS"],
        "anon": fields["RssAnon"],
        "file": fields["RssFile"] + fields["RssShmem"],
        "peak": fields["VmHWM"],
    }


def disk() -> dict[str, int]:
    """Bytes this process has moved to and from storage, from /proc/self/io.

    `read_bytes` and `write_bytes` are counted in the block layer, so direct and io_uring transfers are in them;
    `rchar` and `wchar` are counted in read(2) and write(2) and miss both.
    """
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read_bytes": int(fields["read_bytes"]), "write_bytes": int(fields["write_bytes"])}


def reset_peak() -> None:
    """Start `peak` again from the resident bytes of now, so that what follows is measured without what came before."""
    Path("/proc/self/clear_refs").write_text("5")


def timed_step(
    forward: Callable[[], Any], backward: Callable[[Any], object], step: Callable[[], object]
) -> dict[str, float]:
    """One training step: seconds of its three parts and of the whole, the loss, and the bytes that went to storage."""
    io_before, begun = disk(), time.perf_counter()
    loss = forward()
    after_forward = time.perf_counter()
    backward(loss)
    after_backward = time.perf_counter()
    step()
    ended = time.perf_counter()
    io_after = disk()
    return {
        "forward": after_forward - begun,
        "backward": after_backward - after_forward,
        "step": ended - after_backward,
        "total": ended - begun,
        "loss": float(loss.detach()),
        **{key: io_after[key] - io_before[key] for key in io_after},
    }


def memory_of_run(imported: dict[str, int], built: dict[str, int]) -> dict[str, int]:
    """Resident bytes after importing, while building and since `reset_peak`, which is the training."""
    training = memory()
    return {
        "imported_rss": imported["rss"],
        "setup_peak": built["peak"],
        "training_peak": training["peak"],
        "peak": max(built["peak"], training["peak"]),
        "anon": training["anon"],
        "file": training["file"],
    }


def emit(result: dict[str, object]) -> None:
    """Hand `result` to the parent: one line that no library's own output can be taken for."""
    sys.stdout.flush()
    print("RESULT " + json.dumps(result), flush=True)
