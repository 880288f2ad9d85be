"""Files that a device reads by itself, without host memory in between (GPUDirect Storage): why there are none here.

zeroxide reads no weight so yet. Every tile that comes from disk is compared with its checksum in the pass that uses it,
and the CPU compares: it would have to read from the device what it spares itself to read from the disk. So a config
that asks for it is refused, with what stands in its way on this machine first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.device.placement import is_host
from zeroxide.errors import ConfigError

__all__ = ["check_direct_storage", "cufile_libraries", "storage_problem"]

KEY = "aio.use_gds"

SECONDS = 30.0
"""How long cuFile has to answer."""

_LOOK = """
import sys
from zeroxide import _core, errors
driver, directory, *libraries = sys.argv[1:]
try:
    _core.probe_storage(libraries, directory, driver=driver)
except errors.DeviceError as error:
    print(error)
"""


def check_direct_storage(config: Config, device: torch.device) -> None:
    """Refuses a config that asks for direct reads, in one line with the reason. Raises ConfigError."""
    if not config.aio.use_gds:
        return
    home = config.zero.offload_param
    if is_host(device):
        problem = "the model computes in host memory"
    elif home.path is None:
        problem = "no weights are on disk (zero_optimization.offload_param), and state on disk is updated by the CPU"
    else:
        problem = storage_problem(home.path) or (
            "GPUDirect Storage is there, and zeroxide does not read through it yet: the CPU compares every tile that "
            "comes from disk with its checksum"
        )
    raise ConfigError(
        f"{KEY}: {problem}; remove it: reads go through host memory", path=KEY, expected="false", got="true"
    )


def cufile_libraries() -> list[str]:
    """Where cuFile may be, in the order of trying: NVIDIA's wheels, then what the loader finds by name."""
    spec = find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    # `cu13/lib` for CUDA 13 and later, `cufile/lib` before.
    found = [str(path) for place in places for path in Path(place).glob("cu*/lib/libcufile.so.0")]
    return [*sorted(found), "libcufile.so.0"]


def storage_problem(
    directory: Path, *, driver: str = _core.CUDA_DRIVER, libraries: list[str] | None = None
) -> str | None:
    """Why a device cannot read files of `directory` by itself, in one line; None where it can.

    A process of its own asks: the library writes a log where it is, and does not always come back.
    """
    there = next(each for each in (directory, *directory.absolute().parents) if each.is_dir())
    names = cufile_libraries() if libraries is None else libraries
    package = str(Path(__file__).parents[2])
    others = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([package, *others]),
        "CUFILE_LOGFILE_PATH": os.devnull,
    }
    command = [sys.executable, "-c", _LOOK, driver, str(there), *names]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"cuFile does not answer within {SECONDS:g} s"
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return f"cuFile ended the process that asked it, with {ended.returncode}: {said}"
    return ended.stdout.strip() or None
