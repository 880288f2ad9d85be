"""NVRTC from torch's own wheels, as far as a compile gate needs it: a source, and what it becomes for a GPU."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from emulated import CUDA

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--ptxas-options=-v",
    f"--include-path={CUDA / 'include'}",
)
WHY_NOT = "NVRTC is not installed: torch's CUDA wheels bring it"


def wheel_folders(inside: str) -> list[Path]:
    """Folders of NVIDIA's wheels that have that name."""
    spec = find_spec("nvidia")
    places = [Path(each) for each in (spec.submodule_search_locations or [])] if spec else []
    return [path for place in places for path in place.glob(f"*/{inside}")]


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    found = [path for folder in wheel_folders("lib") for path in folder.glob("libnvrtc.so.*")]
    return ctypes.CDLL(str(found[0])) if found else None


def disassembler() -> str | None:
    """`nvdisasm`, which comes in a wheel of its own or with the toolkit."""
    found = [str(path) for folder in wheel_folders("bin") for path in folder.glob("nvdisasm")]
    return found[0] if found else shutil.which("nvdisasm")


@dataclass(frozen=True)
class Compiled:
    """What a source became. registers, spilled: of each entry point; spilled in bytes."""

    log: str
    ptx: str
    cubin: bytes
    registers: dict[str, int]
    spilled: dict[str, int]


class CompileError(RuntimeError):
    """NVRTC's log."""


def compiled(source: str, text: str, architecture: str) -> Compiled:
    made = nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    made.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{source}.cu".encode(), 0, None, None)
    options = [each.encode() for each in (f"--gpu-architecture={architecture}", *OPTIONS)]
    failed = made.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))

    def read(what: str) -> bytes:
        getattr(made, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(made, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    log = read("ProgramLog").rstrip(b"\0").decode()
    if failed:
        raise CompileError(f"{source} for {architecture}: {log}")
    result = Compiled(log, read("PTX").rstrip(b"\0").decode(), read("CUBIN"), *resources(log))
    made.nvrtcDestroyProgram(ctypes.byref(program))
    return result


def resources(log: str) -> tuple[dict[str, int], dict[str, int]]:
    """Registers and spilled bytes of each entry point, from what ptxas says of it."""
    registers, spilled = {}, {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        registers[name] = int(re.search(r"Used (\d+) registers", part)[1])
        spilled[name] = sum(int(each) for each in re.findall(r"(\d+) bytes spill", part))
    return registers, spilled


def wide_in_ptx(ptx: str) -> dict[str, int]:
    """16-byte loads and stores of global memory in each entry point."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    wide = re.compile(r"\b(?:ld|st)\.global\S*\.(?:v4\.[bufs]32|v2\.[bufs]64)\b")
    return {name: len(wide.findall(body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def wide_in_cubin(cubin: bytes, folder: Path) -> dict[str, int]:
    """The same as machine code has it: LDG.E.128 and STG.E.128."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([disassembler(), "-c", path], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    wide = re.compile(r"\b(?:LDG|STG)\.E\S*\.128\b")
    return {name: len(wide.findall(body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
