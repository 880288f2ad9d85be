"""What is right on this machine: tests, the device suite of the Rust crate, and storages that are emptied."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from benches.gpu.kernels import launcher

from zeroxide import _core
from zeroxide.kernels import compile as compiling

ROOT = Path(__file__).resolve().parents[2]
SANITIZER_SECONDS = 75
SUITE = ROOT / "target" / "gpu" / "device-suite"


def machine() -> list[str]:
    """What this was run on; each line by itself, since a part of it may be missing."""

    def of_gpu() -> str:
        it = torch.cuda.get_device_properties(0)
        return (
            f"{it.name}, sm_{it.major}{it.minor}, {it.multi_processor_count} multiprocessors, "
            f"{it.total_memory / (1 << 30):.0f} GiB, L2 {it.L2_cache_size / (1 << 20):.0f} MiB"
        )

    def of_driver() -> str:
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.mem,clocks.max.sm", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        return f"{said} (version, memory and SM clock), CUDA {_core.probe_cuda().version}"

    def of_host() -> str:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
        limits = Path("/proc/self/limits").read_text().splitlines()
        locked = next(line.split()[3] for line in limits if line.startswith("Max locked memory"))
        return f"{os.cpu_count()} cores, {memory:.0f} GiB, kernel {platform.release()}, locked memory {locked}"

    parts = {
        "date": lambda: time.strftime("%Y-%m-%d"),
        "GPU": of_gpu,
        "driver": of_driver,
        "host": of_host,
        "torch": lambda: f"{torch.__version__}, Python {platform.python_version()}",
        "NVRTC": lambda: ".".join(map(str, compiling.compiler().version)),
        "zeroxide": lambda: _core.__version__,
    }
    lines = []
    for name, of_part in parts.items():
        try:
            lines.append(f"- {name}: {of_part()}")
        except Exception as error:
            lines.append(f"- {name}: unknown ({type(error).__name__}: {error})")
    return lines


def tests(seconds: float) -> list[str]:
    """Runs `tests/gpu` in a process of its own: a device that is lost there is not lost here."""
    if importlib.util.find_spec("pytest") is None:
        return ["Not run: pytest is not installed."]
    # What the project's own settings ask of plugins is not asked here: they may be missing.
    options = ["-q", "-o", "addopts=-ra", "-p", "no:cacheprovider", "--tb=short", "--maxfail=40"]
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            said = (process.communicate()[0] or "") + f"\nended after {seconds:.0f} s"
    lines = said.strip().splitlines()
    if process.returncode == 0 and lines:
        return [f"`{lines[-1]}`"]
    print("\n".join(lines[-400:]), file=sys.stderr, flush=True)
    raise RuntimeError("\n".join(["tests failed", *lines[-60:]]))


def device_suite() -> list[str]:
    """Runs what every device passes, on this one: a test program that was built with cargo and carried along."""
    if not SUITE.is_file():
        return [f"Not run: {SUITE.relative_to(ROOT)} was not built."]
    SUITE.chmod(0o755)
    command = [str(SUITE), "--ignored", "--test-threads=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("test ")]
    if ended.returncode != 0:
        raise RuntimeError(ended.stdout[-3000:] + ended.stderr[-3000:])
    return [f"`{line}`" for line in lines]


def sanitizer() -> list[str]:
    """Runs every kernel under compute-sanitizer, where the toolkit is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return ["Not run: compute-sanitizer is not installed."]
    lines, wrong = [], []
    # A call that the driver refuses is not counted: that is how a kernel is seen to take one argument and no second.
    tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    for check, more in tools.items():
        command = [tool, "--tool", check, *more, "--error-exitcode", "9", sys.executable, "-m", "benches.gpu.run_cases"]
        try:
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            lines.append(f"- {check}: ended after {SANITIZER_SECONDS} s, nothing known")
            continue
        said = [line.strip("= ") for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
        lines.append(f"- {check}: {said[-1] if said else 'said nothing'} (exit {ended.returncode})")
        if ended.returncode != 0:
            wrong += said[:20]
    if wrong:
        raise RuntimeError("\n".join([*lines, *wrong]))
    return lines


def emptied_storage() -> list[str]:
    """What emptying a unit's storage and getting it back costs, by torch's own allocator."""
    nbytes = 512 << 20
    flat = torch.empty(nbytes, dtype=torch.uint8, device=launcher().device)
    storage, times = flat.untyped_storage(), {"empty": [], "fill": []}
    before = torch.cuda.memory_allocated()
    freed = 0
    for _ in range(50):
        start = time.perf_counter()
        storage.resize_(0)
        middle = time.perf_counter()
        freed = before - torch.cuda.memory_allocated()
        again = time.perf_counter()
        storage.resize_(nbytes)
        times["empty"].append(middle - start)
        times["fill"].append(time.perf_counter() - again)
    torch.cuda.synchronize()
    return [
        f"512 MiB: `resize_(0)` {statistics.median(times['empty']) * 1e6:.1f} us and gives {freed >> 20} MiB back, "
        f"`resize_({nbytes})` {statistics.median(times['fill']) * 1e6:.1f} us (host, from torch's cache).",
        "Whether saved views stay right is among the tests (`test_storage.py`).",
    ]
