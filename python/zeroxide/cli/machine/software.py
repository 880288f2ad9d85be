"""Which versions of what are installed, and whether `zeroxide run` can give zeroxide another name."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version

from zeroxide.cli.machine.finding import Finding, broken, fine, lost
from zeroxide.cli.run import VARIABLE, check_startup
from zeroxide.errors import ConfigError

__all__ = ["look"]

NEEDED = {"torch": "2.9", "numpy": "1.26", "pydantic": "2.10", "safetensors": "0.6"}
"""What zeroxide cannot do without, with the least version of each."""
USED = {"transformers": "5.0", "tokenizers": "0.22", "rich": "13", "matplotlib": "3.9"}
"""What `zeroxide train` needs beside; `pip install zeroxide[train]` brings it."""
BESIDE = ("accelerate", "peft", "trl", "lightning", "ray")
"""What zeroxide works with where it is installed."""


def look() -> Iterator[Finding]:
    """The versions, in the order of how much depends on them."""
    import zeroxide

    yield fine("zeroxide", zeroxide.__version__, version=zeroxide.__version__)
    yield fine("Python", platform.python_version(), version=platform.python_version())
    for name, least in NEEDED.items():
        yield _package(name, least, needed=True)
    for name, least in USED.items():
        yield _package(name, least, needed=False)
    for name in BESIDE:
        found = _version(name)
        if found is not None:
            yield fine(name, found, version=found)
    yield _startup()
    yield _deepspeed()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package(name: str, least: str, *, needed: bool) -> Finding:
    found = _version(name)
    how = f"pip install '{name}>={least}'"
    if found is not None and _numbers(found) >= _numbers(least):
        return fine(name, found, version=found)
    shown = "not installed" if found is None else f"{found} is too old"
    if needed:
        return broken(name, shown, how, version=found)
    return lost(name, f"{shown}: zeroxide train needs it", "pip install 'zeroxide[train]'", version=found)


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(each) for each in match[0].split(".")) if match else ()


def _startup() -> Finding:
    what = "the name deepspeed"
    try:
        check_startup()
    except ConfigError as error:
        how = "install zeroxide's wheel, or begin scripts with import zeroxide.integrations.deepspeed"
        return lost(
            what, f"zeroxide run cannot give it to zeroxide: {error.message.split(', by which')[0]} is missing", how
        )
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        return fine(what, f"is zeroxide's in every Python that is started here: {VARIABLE} is set")
    return fine(what, "zeroxide run gives it to zeroxide, in the processes that it starts")


def _deepspeed() -> Finding:
    """A real DeepSpeed; zeroxide under its name has a version that says so."""
    found = _version("deepspeed")
    if found is None or found.endswith("+zeroxide"):
        return fine("DeepSpeed itself", "not installed; zeroxide needs none")
    where = distribution("deepspeed").locate_file("")
    return fine(
        "DeepSpeed itself", f"{found} in {where}; scripts have it unless zeroxide run starts them", version=found
    )
