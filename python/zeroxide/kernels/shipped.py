"""Machine code that comes with zeroxide, so that a first run and a machine without NVRTC need no compiler.

`make` puts it beside this file where NVRTC is there when the wheel is built (`cuda/cubins.py`): a file for each source
and each of `ARCHITECTURES`, which says what it was made of. Code of other sources or options counts as none.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from zeroxide import _core
from zeroxide.errors import DeviceError
from zeroxide.kernels.compile import compile_source, kernel_text

__all__ = ["ARCHITECTURES", "FOLDER", "file_name", "machine_code", "runs_on", "shipped"]

ARCHITECTURES = (80, 90, 100, 120)
"""Compute capabilities, as 90 for 9.0, that a wheel has code for."""

FOLDER = Path(__file__).with_name("cubins")
"""Where the files are."""

ON_A_CHIP = frozenset({87, 101})
"""GPUs that are a part of a processor (Orin, and Thor as CUDA 12 numbers it), which run code of their own only."""


def file_name(source: str, architecture: int) -> str:
    """What the file of a source's code for an architecture is called."""
    return f"{source}.sm_{architecture}.cubin"


def runs_on(device: int) -> list[int]:
    """Those of `ARCHITECTURES` whose code a device of that compute capability runs, the nearest first.

    The same major version, and a minor version that is not above the device's; not between a GPU on a card and one on
    a chip (CUDA C++ Programming Guide, "Binary Compatibility").
    """
    if device in ON_A_CHIP:
        return []
    same = [each for each in ARCHITECTURES if each // 10 == device // 10 and each <= device]
    return sorted(same, reverse=True)


def shipped(source: str, device: int, folder: Path = FOLDER) -> _core.KeptCubin | None:
    """Code of `cuda/kernels/<source>.cu` that a device of that compute capability runs, or None where there is none.

    Warns of a file that is damaged.
    """
    text, headers = kernel_text(source), _core.kernel_headers()
    for architecture in runs_on(device):
        path = folder / file_name(source, architecture)
        try:
            found = _core.read_cubin(path, f"{source}.cu", text, headers, architecture=architecture)
        except DeviceError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            continue
        if found is not None:
            return found
    return None


def machine_code(source: str, device: int, driver: tuple[int, int], folder: Path = FOLDER) -> _core.KeptCubin:
    """Code of a source for a device and a driver of those versions: what came with zeroxide, else by NVRTC.

    A driver takes no code of a compiler of a later major version than its own. Raises DeviceError as `compile_source`.
    """
    found = shipped(source, device, folder)
    return found if found is not None and found.compiler[0] <= driver[0] else compile_source(source, device)
