"""What was measured of this machine and planned for it, kept between commands in the user's cache directory.

It is `planning.json` in `ZEROXIDE_CACHE_DIR`, else in `zeroxide` in `XDG_CACHE_HOME`, else in `~/.cache/zeroxide`.
Figures are by the machine (processor, processors that the process may use, versions) and by the disk's directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Disk", "Machine", "Measurements", "Planned", "age", "cache_file", "machine_key"]

_VERSION = 2
_PLANS = 500
"""So many plans are kept, the newest."""


@dataclass
class Machine:
    """What a process on this machine takes and how fast it is, beside any model."""

    process_bytes: int
    """Resident bytes of a process that trains, beside payload and activations."""
    start_bytes: int
    """Resident bytes when an engine begins to be made, whatever it is for: pages of libraries are not dropped yet."""
    operation_seconds: float
    """Of an operation, beside its own time: Python, autograd and hooks."""
    update_seconds: dict[str, float]
    """Of one parameter's update in host memory, by the format of its state."""
    operations: dict[str, float] = field(default_factory=dict)
    """Seconds of operations by their keys, as they were run again by themselves."""
    flops: float = 0.0
    """A second, of a matrix product: for operations that are too large to be run again."""
    bytes_per_second: float = 0.0
    """Read and written by an operation that works element by element, for the same."""
    fresh_seconds: float = 0.0
    """Of a byte of memory that the system has to give first, beside using it."""
    taken: float = 0.0
    """When, in seconds since 1970."""


@dataclass
class Disk:
    """How fast a directory's disk is."""

    read: float
    """Bytes a second, requests of 1 MiB, 16 in flight."""
    write: float
    update: float
    """Bytes read and written a second while state there is updated, through the store that training uses."""
    work: float = 0.0
    """Seconds of all processors together that a byte read or written takes from what else they do."""
    taken: float = 0.0
    """When, in seconds since 1970."""


@dataclass(frozen=True)
class Planned:
    """What was expected of a run: bytes and seconds of one process."""

    process: int
    """Most resident bytes."""
    read: int
    """Bytes that a step reads from disk."""
    written: int
    forward_and_update: float
    """Seconds of a step. With state on disk the update runs within the next forward, so the two are one figure."""
    backward: float
    taken: float = 0.0
    """When, in seconds since 1970."""

    @staticmethod
    def key(
        digest: str, *, dtype: str, batch: int, sequence: int, accumulate: int, ranks: int, home: str, option: str
    ) -> str:
        """What such a run is known by; digest: of the model, as `ModelChoice.digest` has it; home: a directory, if any
        state is on disk."""
        return f"{digest[:16]} {dtype} {batch} x {sequence} x {accumulate}, {ranks} ranks, {option} {home}"


@dataclass
class Measurements:
    """All that is known of one machine."""

    machine: Machine | None = None
    disks: dict[str, Disk] = field(default_factory=dict)
    """By directory."""
    plans: dict[str, Planned] = field(default_factory=dict)
    """By `Planned.key`."""

    @classmethod
    def load(cls, path: Path, key: str) -> Measurements:
        """What `path` has under `key`: nothing where there is no such file, or it cannot be read."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["version"] != _VERSION or key not in found["machines"]:
                return cls()
            entry = found["machines"][key]
            machine = None if entry["machine"] is None else Machine(**entry["machine"])
            disks = {name: Disk(**each) for name, each in entry["disks"].items()}
            return cls(machine, disks, {name: Planned(**each) for name, each in entry["plans"].items()})
        # A cache that somebody has damaged costs a measurement, not the plan.
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def save(self, path: Path, key: str) -> None:
        """Puts it under `key`, leaves other machines' entries, and replaces the file at once.

        Where the file cannot be written, the next command measures again.
        """
        everything: dict[str, Any] = {"version": _VERSION, "machines": {}}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["version"] == _VERSION:
                everything["machines"] = dict(found["machines"])
        machine = None if self.machine is None else asdict(self.machine)
        everything["machines"][key] = {
            "machine": machine,
            "disks": {name: asdict(each) for name, each in self.disks.items()},
            "plans": {name: asdict(each) for name, each in list(self.plans.items())[-_PLANS:]},
        }
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                json.dump(everything, file)
            os.replace(file.name, path)


def cache_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Where measurements are kept."""
    if own := environment.get("ZEROXIDE_CACHE_DIR"):
        return Path(own) / "planning.json"
    general = environment.get("XDG_CACHE_HOME", "")
    base = Path(general) if os.path.isabs(general) else Path(environment.get("HOME", "~")).expanduser() / ".cache"
    return base / "zeroxide" / "planning.json"


def machine_key(threads: int) -> str:
    """This machine, as far as its figures depend on it."""
    import torch

    import zeroxide
    from zeroxide.cli.training.facts import processor

    versions = f"zeroxide {zeroxide.__version__}, torch {torch.__version__}"
    return f"{platform.node()}, {processor()}, {threads} threads, {versions}"


def age(taken: float) -> str:
    """How long ago that was, in words."""
    seconds = max(0.0, time.time() - taken)
    for size, word in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {word}{'' if count == 1 else 's'} ago"
    return "just now"
