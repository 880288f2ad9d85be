"""The processor, its memory, and how both are divided."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from zeroxide.cli.machine.finding import Finding, broken, fine, lost
from zeroxide.config.sizes import format_bytes

__all__ = ["look"]

LEAST_KERNEL = (5, 7)
_RINGS_UNLOCKED = (5, 12)
"""From this version on, memory of io_uring's rings does not count against the memlock limit."""
_RINGS = 8 << 20
"""Bytes that are more than the rings of the deepest queue take."""
_COPIED = 128 << 20


def look(root: Path = Path("/")) -> Iterator[Finding]:
    """What there is; `root` has proc and sys below it."""
    kernel = _kernel(platform.release())
    yield _system(kernel)
    yield _instructions()
    yield _processors(root)
    yield _numa(root)
    yield _memory(root)
    yield _bandwidth()
    yield _memlock(kernel, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])


def _kernel(release: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _system(kernel: tuple[int, int]) -> Finding:
    shown = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform != "linux" or kernel < LEAST_KERNEL:
        return broken("system", shown, "zeroxide needs Linux 5.7 or later")
    return fine("system", shown)


def _instructions() -> Finding:
    from zeroxide import _core

    found = _core.instruction_set()
    if found == "avx512":
        return fine("instructions", "AVX-512", instructions=found)
    if found == "avx2":
        return fine("instructions", "AVX2; AVX-512, where a processor has it, moves more at once", instructions=found)
    return lost(
        "instructions",
        "neither AVX2 nor AVX-512: optimizer steps are many times slower",
        "use a processor of 2013 or later; a virtual machine may hide them (CPU model host)",
        instructions=found,
    )


def _processors(root: Path) -> Finding:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _quota(root)
    data = {"usable": usable, "there": there, "quota": quota}
    if quota is not None and quota < usable:
        how = "raise the container's CPU limit, or set zeroxide.threads to it"
        return lost("processors", f"{usable} usable, and a limit of {quota:g} of them at a time", how, **data)
    if usable < there:
        how = "start with fewer bindings (taskset, --bind-to, cpuset) if that was not meant"
        return lost("processors", f"{usable} of {there} usable", how, **data)
    return fine("processors", f"{usable} of {there} usable", **data)


def _quota(root: Path) -> float | None:
    """How many processors' time the control group gives, None for all."""
    try:
        most, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return None


def _numa(root: Path) -> Finding:
    nodes = [each.name for each in (root / "sys/devices/system/node").glob("node[0-9]*")]
    count = max(1, len(nodes))
    if count == 1:
        return fine("NUMA", "1 node", nodes=count)
    how = "start one rank for each node, bound to it: numactl --cpunodebind=N --membind=N"
    return lost("NUMA", f"{count} nodes: memory of another one is slower", how, nodes=count)


def _memory(root: Path) -> Finding:
    words = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    total, free = (int(words.get(name, 0)) << 10 for name in ("MemTotal", "MemAvailable"))
    limit = _text(root / "sys/fs/cgroup/memory.max").strip()
    shown = f"{format_bytes(total)}, {format_bytes(free)} of it available"
    if limit.isdigit() and int(limit) < total:
        shown += f"; this container may take {format_bytes(int(limit))}"
        total = int(limit)
    return fine("memory", shown, total=total, available=min(free, total))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _bandwidth() -> Finding:
    import torch

    from zeroxide.device.placement import HOST

    source = torch.ones(_COPIED // 4, device=HOST)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    rate = 2 * _COPIED / best
    return fine(
        "memory speed", f"{rate / 1e9:.1f} GB/s, read and written by {torch.get_num_threads()} threads", rate=rate
    )


def _memlock(kernel: tuple[int, int], limit: int) -> Finding:
    shown = "unlimited" if limit == resource.RLIM_INFINITY else format_bytes(limit)
    if kernel < _RINGS_UNLOCKED and limit != resource.RLIM_INFINITY and limit < _RINGS:
        how = "raise it (ulimit -l, LimitMEMLOCK= or a memlock line in limits.conf) to 8 MiB, or use Linux 5.12"
        return lost(
            "memlock", f"{shown}: too little for the rings of io_uring, which this kernel counts", how, limit=limit
        )
    # new_cpu_locked_tensor locks memory, and raises BudgetError where it may not.
    use = "training needs none of it, DeepSpeed's new_cpu_locked_tensor may lock that much"
    return fine("memlock", f"{shown}; {use}", limit=limit)
