"""Kernels of `cuda/` on the host: built with g++ from the same source, and run lane by lane in a chosen order."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "cuda"
SOURCES = sorted(path.stem for path in (CUDA / "kernels").glob("*.cu"))
COMPILER = shutil.which("g++")
WHY_NOT = "g++ is not installed: kernels cannot be built for the host"

FORWARD, REVERSE, RANDOM = range(3)
FLAGS = ["-std=c++17", "-Og", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def processor_flags() -> list[str]:
    """fmaf as one instruction where the processor has it: the same bits as the library's, much faster."""
    try:
        return ["-mfma"] if " fma " in Path("/proc/cpuinfo").read_text() else []
    except OSError:
        return []


class Builds:
    """Shared objects in a folder, each built once. `flags` go to every compilation."""

    def __init__(self, folder: Path, flags: tuple[str, ...] = ()):
        self.folder = folder
        self.flags = [*FLAGS, *processor_flags(), *flags]

    @functools.cached_property
    def prefix(self) -> Path:
        """The emulator's header, compiled ahead: most of the time of a compilation is in it."""
        header = self.folder / "emulator.h"
        header.write_text(f'#include "{CUDA / "emu" / "emulator.h"}"\n')
        self.compile([*WARNINGS, "-x", "c++-header", header, "-o", f"{header}.gch"])
        return header

    @functools.cached_property
    def runtime(self) -> Path:
        """What runs kernels, to be linked to each source."""
        target = self.folder / "emulator.o"
        self.compile([*WARNINGS, "-c", CUDA / "emu" / "emulator.cpp", "-o", target])
        return target

    def compile(self, arguments: list) -> None:
        done = subprocess.run([COMPILER, *self.flags, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"g++ {' '.join(map(str, arguments))}\n{done.stderr}")

    def build(self, source: str, changed: dict[str, str] | None = None) -> Path:
        """`source` for the host. changed: texts of files under `cuda/` that take the place of those there."""
        changed = changed or {}
        name = f"{source}-{hashlib.sha256(repr(sorted(changed.items())).encode()).hexdigest()[:12]}"
        target = self.folder / f"{name}.so"
        if target.exists():
            return target
        for path, text in changed.items():
            place = self.folder / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        path = f"kernels/{source}.cu"
        main = self.folder / name / path if path in changed else CUDA / path
        includes = ["-I", self.folder / name / "include", "-I", CUDA / "include"]
        # A change that is a mistake on purpose may be one that g++ warns of.
        warnings = ["-w"] if changed else WARNINGS
        self.compile(
            [
                *warnings,
                *includes,
                "-include",
                self.prefix,
                "-shared",
                "-x",
                "c++",
                main,
                "-x",
                "none",
                self.runtime,
                "-o",
                target,
            ]
        )
        return target

    def build_all(self, sources=SOURCES) -> dict[str, Path]:
        assert self.prefix.exists()
        assert self.runtime.exists()
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(sources, pool.map(self.build, sources), strict=True))


class LaunchError(RuntimeError):
    """A kernel did what no GPU would allow, or its lanes wait for one another for ever."""


@functools.cache
def library(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.zx_failure.restype = ctypes.c_char_p
    loaded.zx_launch.argtypes = [
        ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint,
    ]  # fmt: skip
    return loaded


class Emulator:
    """A launcher for tensors in host memory. `launched` counts what it has run."""

    def __init__(self, libraries: dict[str, Path], order: int = FORWARD, seed: int = 0):
        self.libraries = libraries
        self.order = order
        self.seed = seed
        self.launched = 0

    def launch(self, kernel, blocks: int, args: bytes) -> None:
        made = library(self.libraries[kernel.source])
        self.launched += 1
        assert kernel.shared_bytes == 0, "the emulator has no dynamic shared memory"
        failed = made.zx_launch(
            kernel.entry.encode(), blocks, kernel.threads, args, len(args), self.order, self.seed + self.launched
        )
        if failed:
            raise LaunchError(f"{kernel.entry}: {made.zx_failure().decode()}")


class Guards:
    """Tensors with memory around them that nobody may write."""

    FILL = 0xA5
    AROUND = 4096

    def __init__(self):
        self.arenas = []

    def copy(self, values: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """The same values in guarded memory, `shift` elements from an aligned address."""
        start = self.AROUND + shift * values.element_size()
        size = values.numel() * values.element_size()
        arena = torch.full((start + size + self.AROUND,), self.FILL, dtype=torch.uint8)
        inside = arena[start : start + size].view(values.dtype) if size else values.reshape(-1)
        inside.copy_(values.reshape(-1))
        self.arenas.append((arena, start, size))
        return inside.view(values.shape)

    def intact(self) -> bool:
        return all(
            bool((arena[:start] == self.FILL).all()) and bool((arena[start + size :] == self.FILL).all())
            for arena, start, size in self.arenas
        )


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in every bit, but that any NaN is equal to any other."""
    if got.shape != expected.shape or got.dtype is not expected.dtype:
        return False
    if not got.is_floating_point():
        return torch.equal(got, expected)
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    bits = kinds[got.element_size()]
    both = got.isnan() & expected.isnan()
    return bool((both | (got.contiguous().view(bits) == expected.contiguous().view(bits))).all())


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """As a KernelCase's tolerance says; 0 asks for the same bits."""
    if tolerance == 0.0:
        return same_bits(got, expected)
    if got.shape != expected.shape or got.dtype is not expected.dtype:
        return False
    finite = expected.double()[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(got.double(), expected.double(), rtol=0, atol=tolerance * scale, equal_nan=True)


ALL_ONES_NAN = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()
FINITE = (2.5, 0.5, 1052672.0, 1082130432.0, 1.00390625, 0.0, -0.0, 1e-45, -1e-40, 6e-8, -5.96e-8, 127.0, 1e-38)
"""Ties of roundings, zeros, denormals of each dtype. 1052672 is a tie of bf16 and makes one of 1082130432 beside it."""
OVERFLOWING = (3e38, -65519.0, float("inf"), -float("inf"), float("nan"), ALL_ONES_NAN)


def special(inputs, *, finite: bool = False) -> None:
    """Puts special values into the inputs of a case, others at the same place of each tensor."""
    values = torch.tensor(FINITE if finite else FINITE + OVERFLOWING)
    tensors = [tensor for each in inputs.values() for tensor in each if tensor.is_floating_point()]
    for number, tensor in enumerate(tensors):
        flat = tensor.view(-1)
        at = torch.arange(0, flat.numel(), 11)
        flat[at] = values.roll(number)[at // 11 % len(values)].to(flat.dtype)


def run_guarded(case, n: int, launcher: Emulator, shift: int = 0, only: int | None = None, change=None) -> str | None:
    """Runs a case on guarded copies of its inputs. What is wrong, in a few words, or None.

    shift: elements by which tensors are off an aligned address: all, or where `only` is given, the one of that number.
    change: a function that is given the inputs before anything is run, to put special values there.
    """
    made = case.make(n, torch.device("cpu"))
    if change is not None:
        change(made)
    expected = case.reference(made)
    guards, number, guarded = Guards(), 0, {}
    for name, tensors in made.items():
        guarded[name] = []
        for each in tensors:
            guarded[name].append(guards.copy(each, shift if only in (None, number) else 0))
            number += 1
    try:
        got = case.run(launcher, guarded)
    except LaunchError as error:
        return str(error)
    if not guards.intact():
        return "wrote outside of its tensors"
    if len(got) != len(expected):
        return f"{len(got)} outputs, expected {len(expected)}"
    for at, (mine, wanted) in enumerate(zip(got, expected, strict=True)):
        if not close(mine, wanted, case.tolerance):
            return f"output {at} differs"
    return None
