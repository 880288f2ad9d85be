"""What kernels become for a GPU, by NVRTC as the product calls it: machine code, its registers, its loads.

Machine code is what came with zeroxide where that was made of the sources as they are, else it is kept under
`target/kernels`: nothing is compiled twice.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from emulated import CUDA, ROOT

from zeroxide import _core
from zeroxide.errors import DeviceError
from zeroxide.kernels.compile import compiler
from zeroxide.kernels.shipped import ARCHITECTURES, FOLDER, file_name

__all__ = [
    "ARCHITECTURES",
    "Compiled",
    "UnknownToDisassembler",
    "Wide",
    "compiled",
    "disassembler",
    "nvrtc",
    "text_of",
    "tree_headers",
    "wide_by_disassembler",
    "wide_in_code",
]

CACHE = ROOT / "target" / "kernels"
WHY_NOT = "NVRTC is not installed: torch's CUDA wheels bring it"


@functools.cache
def nvrtc() -> _core.Nvrtc | None:
    try:
        return compiler()
    except DeviceError:
        return None


def disassembler() -> str | None:
    """`nvdisasm`, which comes with triton, in a wheel of its own or with the toolkit."""
    triton, nvidia = find_spec("triton"), find_spec("nvidia")
    places = [Path(each) / "backends/nvidia" for each in (triton.submodule_search_locations if triton else ())]
    places += [Path(each) for each in (nvidia.submodule_search_locations if nvidia else ())]
    found = [str(path) for place in places for path in place.glob("**/bin/nvdisasm")]
    return found[0] if found else shutil.which("nvdisasm")


@dataclass(frozen=True)
class Compiled:
    """What a source became. registers, spilled: of each entry point; spilled in bytes."""

    log: str
    cubin: bytes
    registers: dict[str, int]
    spilled: dict[str, int]


def text_of(source: str) -> str:
    return (CUDA / "kernels" / f"{source}.cu").read_text()


@functools.cache
def tree_headers() -> list[tuple[str, str]]:
    """What sources include, as the extension module has it: name and text."""
    folder = CUDA / "include"
    return [(str(path.relative_to(folder)), path.read_text()) for path in sorted(folder.rglob("*.cuh"))]


def compiled(source: str, text: str, architecture: int) -> Compiled:
    """Raises DeviceError where the compiler refuses the text."""
    given = (f"{source}.cu", text, tree_headers())
    kept = _core.read_cubin(FOLDER / file_name(source, architecture), *given, architecture=architecture)
    if kept is None or kept.compiler != nvrtc().version:
        kept = nvrtc().compile(*given, architecture=architecture, cache=CACHE)
    return Compiled(kept.log, kept.cubin, *resources(kept.log))


def resources(log: str) -> tuple[dict[str, int], dict[str, int]]:
    """Registers and spilled bytes of each entry point, from what ptxas says of it."""
    registers, spilled = {}, {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        registers[name] = int(re.search(r"Used (\d+) registers", part)[1])
        spilled[name] = sum(int(each) for each in re.findall(r"(\d+) bytes spill", part))
    return registers, spilled


@dataclass(frozen=True)
class Wide:
    """How many instructions of an entry point move 16 bytes of global memory at a time."""

    loads: int
    stores: int


LOADS, STORES = (0x381, 0x981), (0x386, 0x986)
"""LDG and STG, the lower 12 bits of an instruction, without and with a descriptor. Bits 73 to 75 are the size."""
SIXTEEN_BYTES = 6


def wide_in_code(cubin: bytes) -> dict[str, Wide]:
    """Of each entry point, as the bits of its instructions have it: they have 16 bytes each."""
    found = {}
    for name, code in sections(cubin).items():
        if name.startswith(".text."):
            words = np.frombuffer(code, dtype="<u8").reshape(-1, 2)
            wide = words[words[:, 1] >> 9 & 7 == SIXTEEN_BYTES, 0] & 0xFFF
            loads, stores = (int(np.isin(wide, codes).sum()) for codes in (LOADS, STORES))
            found[name.removeprefix(".text.")] = Wide(loads, stores)
    return found


def sections(elf: bytes) -> dict[str, bytes]:
    """Name and bytes of each section of a file of machine code."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    each, count, names = struct.unpack_from("<HHH", elf, 58)
    rows = [struct.unpack_from("<IIQQQQ", elf, table + at * each) for at in range(count)]
    text = rows[names][4]
    return {
        elf[text + row[0] : elf.index(0, text + row[0])].decode(): elf[row[4] : row[4] + row[5]]
        for row in rows
        if row[1]
    }


class UnknownToDisassembler(Exception):
    """`nvdisasm` is older than the architecture."""


def wide_by_disassembler(cubin: bytes, folder: Path) -> dict[str, Wide]:
    """The same, as `nvdisasm` reads the code: LDG.E.128 and STG.E.128.

    Raises UnknownToDisassembler, with what it says.
    """
    path = folder / f"{hashlib.sha256(cubin).hexdigest()}.cubin"
    path.write_bytes(cubin)
    # Without the analysis of branches, which is a third of its time and shows in no instruction.
    ended = subprocess.run([disassembler(), "-c", "-ndf", path], capture_output=True, text=True)
    if "Cannot decode architecture" in ended.stderr:
        raise UnknownToDisassembler(ended.stderr.strip())
    assert ended.returncode == 0, ended.stderr
    parts = re.split(r"^\.text\.(\w+):$", ended.stdout, flags=re.MULTILINE)
    loads, stores = (re.compile(rf"\b{each}\.E\S*\.128\b") for each in ("LDG", "STG"))
    return {
        name: Wide(len(loads.findall(body)), len(stores.findall(body)))
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
