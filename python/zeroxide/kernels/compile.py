"""How a kernel's source becomes machine code on this machine: by NVRTC, once, and from a directory from then on.

NVRTC comes with torch's CUDA wheels. Machine code is kept in `kernels` under `ZEROXIDE_CACHE_DIR`, else under
`zeroxide` in `XDG_CACHE_HOME`, else in `~/.cache/zeroxide`; any number of processes may use it at once.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from zeroxide import _core
from zeroxide.errors import DeviceError

__all__ = ["cache_directory", "compile_source", "compiler", "kernel_text", "nvrtc_libraries"]

LOADER_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
"""What the loader may find without being told where."""


def nvrtc_libraries() -> list[str]:
    """Where NVRTC may be, in the order of trying: NVIDIA's wheels, those of torch's CUDA version first."""
    spec = find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    # `cu13/lib` for CUDA 13 and later, `cuda_nvrtc/lib` before.
    found = [str(path) for place in places for path in Path(place).glob("cu*/lib/libnvrtc.so.*")]
    major = (torch.version.cuda or "").split(".")[0]
    return [*sorted(found, key=lambda path: (not path.endswith(f".so.{major}"), path)), *LOADER_NAMES]


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where machine code is kept. Raises DeviceError where nobody says and there is no home directory."""
    if own := environment.get("ZEROXIDE_CACHE_DIR"):
        return Path(own) / "kernels"
    general = environment.get("XDG_CACHE_HOME", "")
    if os.path.isabs(general):
        return Path(general) / "zeroxide" / "kernels"
    home = environment.get("HOME") or os.path.expanduser("~")
    if not os.path.isabs(home):
        raise DeviceError("no home directory to keep compiled kernels in: set ZEROXIDE_CACHE_DIR to a directory")
    return Path(home) / ".cache" / "zeroxide" / "kernels"


@functools.cache
def compiler() -> _core.Nvrtc:
    """The compiler of this process. Raises DeviceError where there is none."""
    return _core.Nvrtc(nvrtc_libraries())


def kernel_text(source: str) -> str:
    """The text of `cuda/kernels/<source>.cu`, which the extension module carries."""
    text = _core.kernel_source(source)
    assert text is not None, f"no source of kernels is called {source}"
    return text


def compile_source(source: str, architecture: int) -> _core.KeptCubin:
    """Machine code of `cuda/kernels/<source>.cu` for a compute capability, as 90 for 9.0.

    Warns where it cannot be kept. Raises DeviceError where it cannot be made: no NVRTC, one that does not know the
    architecture, a source that it refuses, with its log.
    """
    text, headers = kernel_text(source), _core.kernel_headers()
    kept = compiler().compile(f"{source}.cu", text, headers, architecture=architecture, cache=cache_directory())
    if kept.problem is not None:
        warnings.warn(kept.problem, RuntimeWarning, stacklevel=2)
    return kept
