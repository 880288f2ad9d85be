"""Builds the backend: once for each state of its sources, compiler and torch, under `target/simulated`."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Found and not imported: its headers and its version are all that counts.
TORCH = Path(str(importlib.util.find_spec("torch").origin)).parent
SOURCES = Path(__file__).with_name("src")
CACHE = Path(__file__).parents[2] / "target" / "simulated"
FLAGS = ("-std=c++20", "-O1", "-fPIC")
PARTS = {
    "operations": True,
    "composed": True,
    "copies": True,
    "data": True,
    "backend": True,
    "face": True,
    "clocks": False,
    "streams": False,
    "memory": False,
    "host": False,
    "order": False,
}
"""Whether a translation unit knows torch; the slowest to compile first."""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def digest(*paths: Path) -> str:
    """Of all that is made from these sources."""
    known = hashlib.sha256()
    version = subprocess.run([compiler(), "--version"], check=True, capture_output=True, text=True).stdout
    for each in (version, (TORCH / "version.py").read_text(), str(TORCH), *FLAGS):
        known.update(each.encode() + b"\0")
    for path in sorted(paths):
        known.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return known.hexdigest()[:16]


def library() -> Path:
    """The path of the library, which is built first where it is not there; one process builds, others wait.

    Raises:
        RuntimeError: with what the compiler has said.
    """
    built = CACHE / f"{digest(*SOURCES.iterdir())}.so"
    if built.exists():
        return built
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            build(built)
    return built


def build(built: Path) -> None:
    include = TORCH / "include"
    headers = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]

    shared = sorted(SOURCES.glob("*.h"))

    def compiled(part: str) -> str:
        source = SOURCES / f"{part}.cpp"
        target = CACHE / f"{part}-{digest(source, *shared)}.o"
        if not target.exists():
            make(target, [*FLAGS, *(headers if PARTS[part] else []), "-c", str(source)])
        return str(target)

    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, PARTS))
    make(built, ["-shared", "-pthread", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"])


def make(target: Path, arguments: list[str]) -> None:
    """Runs the compiler. The target is there as a whole or not at all, whatever happens meanwhile."""
    aside = target.with_suffix(".new")
    ended = subprocess.run([compiler(), *arguments, "-o", str(aside)], capture_output=True, text=True)
    if ended.returncode != 0:
        raise RuntimeError(f"the simulated device does not build: {' '.join(arguments)}\n{ended.stderr}")
    aside.rename(target)
