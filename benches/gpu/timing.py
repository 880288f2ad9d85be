"""How long work takes on a GPU, by events, without what the host needs to start it."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from zeroxide.kernels import Kernel, Launcher

SLEEP_CYCLES = 2_000_000
"""For about 1 ms the GPU is busy while the host gives it what is timed."""


def medians(works: list[Callable[[], object]], rounds: int = 10, warm: int = 3) -> list[float]:
    """Seconds of each, taken in turns. Each is started while the GPU still sleeps."""
    for _ in range(warm):
        for work in works:
            work()
    torch.cuda.synchronize()
    times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in works]
    for _ in range(rounds):
        for work, pairs in zip(works, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            work()
            end.record()
            pairs.append((start, end))
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3 for pairs in times]


class TimedLauncher:
    """Launches as another does and remembers how long kernels take, from event to event."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def launch(self, kernel: Kernel, blocks: int, args: bytes) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        self.launcher.launch(kernel, blocks, args)
        end.record()
        self.pairs.append((start, end))

    def taken(self) -> float:
        """Seconds of the kernels since the last call."""
        torch.cuda.synchronize()
        total = sum(start.elapsed_time(end) for start, end in self.pairs) / 1e3
        self.pairs.clear()
        return total


def copy_rate(nbytes: int = 1 << 30) -> float:
    """Bytes a second that a copy within the device reads and writes together."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    (seconds,) = medians([lambda: target.copy_(source)])
    return 2 * nbytes / seconds
