"""Kernels: how long they take to compile and to start, and what share of the memory's bandwidth they reach."""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from benches.gpu.timing import TimedLauncher, copy_rate, medians

import zeroxide.kernels
from zeroxide import _core
from zeroxide.kernels import KernelCase
from zeroxide.kernels import compile as compiling
from zeroxide.kernels.launch import CudaLauncher

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "gpu"))

ROUNDS = 9
BIT_ELEMENTS = 300_007


@functools.cache
def launcher() -> CudaLauncher:
    return CudaLauncher()


def sources() -> list[str]:
    return sorted({kernel.source for kernel in zeroxide.kernels.KERNELS})


def compile_times() -> list[str]:
    """Seconds of every source with an empty cache, and out of it."""
    architecture = launcher().context.architecture
    lines = [
        f"NVRTC {'.'.join(map(str, compiling.compiler().version))} for sm_{architecture}, "
        f"from `{Path(compiling.compiler().library).name}`.",
        "",
        "| source | cold s | cached ms | kernels | most registers | local bytes |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as cache:
        for source in sources():
            text = _core.kernel_source(source)
            times = []
            for _ in range(2):
                start = time.perf_counter()
                compiling.compiler().compile(
                    f"{source}.cu", text, _core.kernel_headers(), architecture=architecture, cache=cache
                )
                times.append(time.perf_counter() - start)
            kernels = [kernel for kernel in zeroxide.kernels.KERNELS if kernel.source == source]
            usages = [launcher().load(kernel).usage() for kernel in kernels]
            lines.append(
                f"| {source} | {times[0]:.2f} | {times[1] * 1e3:.2f} | {len(kernels)} "
                f"| {max(each[0] for each in usages)} | {max(each[1] for each in usages)} |"
            )
    return lines


def rates(elements: int) -> list[str]:
    """Time and share of the copy's bandwidth of every kernel, and whether it has the reference's bits."""
    device, copied = launcher().device, copy_rate()
    lines = [
        f"{elements} elements; a copy within the device moves {copied / 1e9:.0f} GB/s. Bits against the CPU at "
        f"{BIT_ELEMENTS} elements.",
        "",
        "| kernel | ms | GB/s | share of copy | bits |",
        "|---|---|---|---|---|",
    ]
    for case in zeroxide.kernels.ALL:
        try:
            seconds = case_seconds(case, elements, device)
            rate = case.moved(elements) / seconds
            row = f"{seconds * 1e3:.3f} | {rate / 1e9:.0f} | {rate / copied:.2f}"
        except Exception as error:
            row = f"{first_line(error)} | | "
        lines.append(f"| {case.name} | {row} | {bits(case, device)} |")
        torch.cuda.empty_cache()
    return lines


def case_seconds(case: KernelCase, elements: int, device: torch.device) -> float:
    """The median time of a case's kernels, on sets of inputs that take turns: together larger than the L2 cache."""
    largest = torch.cuda.get_device_properties(device).L2_cache_size
    sets = [case.make(elements, device) for _ in range(2 if case.moved(elements) > 2 * largest else 4)]
    timed = TimedLauncher(launcher())
    times = []
    for turn in range(ROUNDS + 2):
        case.run(timed, sets[turn % len(sets)])
        seconds = timed.taken()
        if turn >= 2:
            times.append(seconds)
    return statistics.median(times)


def bits(case: KernelCase, device: torch.device) -> str:
    from guarded import problem

    try:
        found = problem(case, BIT_ELEMENTS, launcher(), device)
    except Exception as error:
        return first_line(error)
    return found or ("equal" if not case.tolerance else f"within {case.tolerance:g}")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".replace("|", "/")


def launch_time() -> list[str]:
    """What the host needs for one launch, and for a whole wrapper."""
    case = next(each for each in zeroxide.kernels.ALL if each.name.startswith("update_"))
    inputs = case.make(1024, launcher().device)
    given: list[tuple] = []

    class Remember:
        def launch(self, kernel, blocks, args):
            given.append((kernel, blocks, args))
            launcher().launch(kernel, blocks, args)

    case.run(Remember(), inputs)
    scaled = torch.ones(1024, device=launcher().device)
    works = {
        f"wrapper of {case.name}": lambda: case.run(launcher(), inputs),
        "launch": lambda: launcher().launch(*given[0]),
        "torch's mul_": lambda: scaled.mul_(1.0),
    }
    lines = ["| | host us |", "|---|---|"]
    for name, work in works.items():
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                work()
            times.append((time.perf_counter() - start) / 200)
        lines.append(f"| {name} | {statistics.median(times) * 1e6:.1f} |")
    return lines


def beside_torch(elements: int) -> list[str]:
    """The optimizer step over fp32 state: our kernel and torch's fused AdamW, in turns."""
    device = launcher().device
    lines = ["| fp32 AdamW | ms | ns an element |", "|---|---|---|"]
    case = next(each for each in zeroxide.kernels.ALL if each.name == "update_adamw_fp32_f32")
    inputs = case.make(elements, device)
    param = torch.nn.Parameter(torch.randn(elements, device=device))
    param.grad = torch.randn(elements, device=device)
    optimizer = torch.optim.AdamW([param], lr=1e-3, fused=True)
    ours, theirs = medians([lambda: case.run(launcher(), inputs), optimizer.step], rounds=ROUNDS)
    for name, seconds in (("zeroxide", ours), ("torch fused", theirs), ("ratio", ours / theirs)):
        cells = f"{seconds:.2f} | " if name == "ratio" else f"{seconds * 1e3:.3f} | {seconds / elements * 1e9:.4f}"
        lines.append(f"| {name} | {cells} |")
    return lines
