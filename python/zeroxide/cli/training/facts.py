"""What a run was made with, for whoever reads its log later: versions, machine, command and config."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from zeroxide.cli.training.running import Running

__all__ = ["facts_of", "processor"]

_PACKAGES = ("transformers", "tokenizers", "numpy")


def facts_of(this: Running) -> dict[str, Any]:
    """Facts of the run by name, as JSON has them: sizes in bytes."""
    engine, config = this.engine, dict(this.engine.config)
    # JSON has no word for it: no lines of progress.
    config.pop("steps_per_print", None)
    return {
        "command": _command(sys.argv),
        "ranks": this.together.world,
        "limit": engine.memory().get("limit"),
        "device": str(engine.device),
        "disk": str(engine.io().get("engine", "")),
        "data": this.data.description,
        "tokens": {"train": this.data.train.count, "held_out": this.data.held_out.count},
        "expected": engine.plan().expected_peaks(loaded=this.loaded),
        "config": config,
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "processor": processor(),
            "processors": len(os.sched_getaffinity(0)),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def _command(arguments: list[str]) -> str:
    """The command line, as one that may be given again."""
    name = Path(arguments[0]).name
    program = "python -m zeroxide.cli" if name == "__main__.py" else shlex.quote(name)
    return " ".join([program, shlex.join(arguments[1:])])


def _versions() -> dict[str, str]:
    import torch

    import zeroxide

    found = {"zeroxide": zeroxide.__version__, "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system tells it; empty where it does not."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")
