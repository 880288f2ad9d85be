"""Copies between host and device: registered memory of the core's, torch's pinned memory, and pageable memory."""

from __future__ import annotations

import time

import torch
from benches.gpu.kernels import launcher
from benches.gpu.timing import medians

GIB = 1 << 30
BYTES = GIB
WIDTH = 8192


def registered(nbytes: int) -> torch.Tensor:
    """The core's memory, registered in place; the tensor keeps it."""
    return torch.frombuffer(launcher().context.host_memory(nbytes), dtype=torch.uint8)


def unregistered(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(launcher().context.host_memory(nbytes, registered=False), dtype=torch.uint8)


def pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def pageable(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


KINDS = {
    "registered": registered,
    "core, not registered": unregistered,
    "torch pinned": pinned,
    "torch pageable": pageable,
}


def host_memory() -> list[str]:
    """Seconds to get memory, and rates up and down."""
    lines = [
        f"{BYTES / GIB:.0f} GiB at a time. Seconds to get: the memory's first touch counted for all.",
        "",
        "| memory | s/GiB to get | up GB/s | down GB/s | is_pinned | s/GiB to give back |",
        "|---|---|---|---|---|---|",
    ]
    device = torch.empty(BYTES, dtype=torch.uint8, device="cuda").fill_(3)
    for name, make in KINDS.items():
        # torch keeps pinned memory that it is given back, so that the first time is the one that counts.
        start = time.perf_counter()
        memory = make(BYTES)
        memory[::4096] = 1
        got = time.perf_counter() - start
        memory.fill_(1)
        up, down = medians(
            [
                lambda memory=memory: device.copy_(memory, non_blocking=True),
                lambda memory=memory: memory.copy_(device, non_blocking=True),
            ],
            rounds=5,
            warm=1,
        )
        lines.append(
            f"| {name} | {got * GIB / BYTES:.3f} | {BYTES / up / 1e9:.1f} | {BYTES / down / 1e9:.1f} "
            f"| {memory.is_pinned()} "
        )
        start = time.perf_counter()
        del memory
        lines[-1] += f"| {(time.perf_counter() - start) * GIB / BYTES:.3f} |"
    return lines


def by_size() -> list[str]:
    """Rates of copies of tiles, one after the other on a stream."""
    lines = [
        "Registered memory, copies of one size behind one another.",
        "",
        "| MiB | up GB/s | down GB/s |",
        "|---|---|---|",
    ]
    host, device = registered(256 << 20), torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for mebibytes in (0.0625, 0.25, 1, 2, 4, 16, 64):
        size = int(mebibytes * (1 << 20))
        count = min(64, host.numel() // size)
        parts = [slice(at * size, (at + 1) * size) for at in range(count)]

        def up(parts=parts):
            for part in parts:
                device[part].copy_(host[part], non_blocking=True)

        def down(parts=parts):
            for part in parts:
                host[part].copy_(device[part], non_blocking=True)

        rates = [count * size / seconds / 1e9 for seconds in medians([up, down], rounds=5, warm=1)]
        lines.append(f"| {mebibytes:g} | {rates[0]:.1f} | {rates[1]:.1f} |")
    return lines


def overlap() -> list[str]:
    """Copies of both directions at once, and copies beside a kernel that uses the whole device."""
    nbytes = GIB // 2
    hosts = [registered(nbytes), registered(nbytes)]
    devices = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    above, below = torch.cuda.Stream(), torch.cuda.Stream()
    a = torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16)

    def beside(stream: torch.cuda.Stream, work) -> None:
        main = torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            work()

    def join() -> None:
        for stream in (above, below):
            torch.cuda.current_stream().wait_stream(stream)

    def up() -> None:
        beside(above, lambda: devices[0].copy_(hosts[0], non_blocking=True))

    def down() -> None:
        beside(below, lambda: hosts[1].copy_(devices[1], non_blocking=True))

    def compute() -> None:
        for _ in range(8):
            torch.mm(a, b)

    def together(*works):
        def all_of_them() -> None:
            for work in works:
                work()
            join()

        return all_of_them

    alone_up, alone_down, both, alone, with_up, with_both = medians(
        [
            together(up),
            together(down),
            together(up, down),
            together(compute),
            together(up, compute),
            together(up, down, compute),
        ],
        rounds=5,
        warm=1,
    )
    hidden = (alone + alone_up - with_up) / min(alone, alone_up)
    hidden_both = (alone + both - with_both) / min(alone, both)
    return [
        f"{nbytes / GIB:g} GiB each way, registered; the kernel is 8 bf16 products of {WIDTH} x {WIDTH}.",
        "",
        "| | ms | GB/s |",
        "|---|---|---|",
        f"| up | {alone_up * 1e3:.2f} | {nbytes / alone_up / 1e9:.1f} |",
        f"| down | {alone_down * 1e3:.2f} | {nbytes / alone_down / 1e9:.1f} |",
        f"| up and down at once | {both * 1e3:.2f} | {2 * nbytes / both / 1e9:.1f} |",
        f"| kernel | {alone * 1e3:.2f} | |",
        f"| kernel and up | {with_up * 1e3:.2f} | {hidden:.0%} of the shorter hidden |",
        f"| kernel, up and down | {with_both * 1e3:.2f} | {hidden_both:.0%} of the shorter hidden |",
    ]
