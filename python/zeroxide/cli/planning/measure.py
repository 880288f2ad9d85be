"""Takes what is not known of this machine yet, and keeps it."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from zeroxide.cli.planning.measured import Disk, Machine, Measurements, Planned, age, cache_file, machine_key
from zeroxide.cli.planning.passes import missing, pass_seconds, rehearse_training, time_operations
from zeroxide.cli.planning.probe import run_probe
from zeroxide.cli.training.models import PRESETS, preset
from zeroxide.errors import StorageError
from zeroxide.profiling.rehearsal import Rehearsal

__all__ = ["Measuring"]

_DISK_BYTES, _DISK_SECONDS = 256 << 20, 1.0
_FRESH_BYTES = 64 << 20
_SMALL, _USUAL = 64, 768
"""Widths of the probe's models: one whose operations take next to nothing, and one with buffers of a usual size."""


class Measuring:
    """The measurements of this machine for `threads` threads: from the cache, and taken where they are not there.

    renew: nothing of the cache is used. say: told of what takes time.
    """

    def __init__(self, threads: int, say: Callable[[str], None], *, renew: bool) -> None:
        self._threads, self._say = threads, say
        self._path, self._key = cache_file(), machine_key(threads)
        self._found = Measurements() if renew else Measurements.load(self._path, self._key)
        self.taken: list[str] = []
        """What there is, and since when, in lines."""

    def machine(self, formats: Sequence[str]) -> Machine:
        """Rates of this machine, with updates in these formats. Raises ZeroxideError."""
        found = self._found.machine
        if found is None:
            self._say("measuring what a process takes")
            usual = run_probe("process", threads=self._threads, width=_USUAL)
            small = run_probe("process", threads=self._threads, width=_SMALL)
            found = Machine(usual["process_bytes"], small["peak_bytes"], 0.0, {}, taken=time.time())
            self._found.machine = found
            found.operation_seconds = self._beside_operations(found, small["pass_seconds"])
            # An operation's threads touch its memory side by side.
            found.fresh_seconds = _fresh_seconds() / self._threads
        for each in formats:
            if each not in found.update_seconds:
                self._say(f"measuring an update in host memory, format {each}")
                taken = run_probe("update", threads=self._threads, offload="cpu", format=each)
                found.update_seconds[each] = taken["seconds"] / taken["parameters"]
        self._save()
        self.taken.append(f"this machine: measured {age(found.taken)}")
        return found

    def _beside_operations(self, machine: Machine, seconds: float) -> float:
        """What an operation takes beside its own time: the rest of a pass whose operations take next to nothing."""
        import torch

        choice = preset("probe", {**PRESETS["tiny"], "vocab_size": 8192, "n_embd": _SMALL, "n_head": 1})
        rehearsal = rehearse_training(choice, torch.bfloat16, 2, 128, checkpointing=False)
        time_operations(machine, missing(machine, [rehearsal]), self._threads, lambda _: None)
        own = pass_seconds(machine, rehearsal)
        count = sum(sum(each.operations.values()) for each in (rehearsal.forward, rehearsal.backward))
        return max(0.0, seconds - own.forward - own.backward) / count

    def operations(self, machine: Machine, rehearsals: list[Rehearsal]) -> None:
        """Times the operations of these that are not known yet."""
        wanted = missing(machine, rehearsals)
        if wanted:
            time_operations(machine, wanted, self._threads, self._say)
            self._save()

    def disk(self, directory: Path) -> Disk:
        """How fast the disk of a directory is. Raises StorageError, ZeroxideError.

        The update is one in `split`, which computes least for what it moves: what formats of fewer bytes compute for
        as many is known from memory.
        """
        from zeroxide import _core

        key = str(directory.resolve())
        found = self._found.disks.get(key)
        if found is None:
            self._say(f"measuring the disk of {directory}")
            if not directory.is_dir():
                raise StorageError(f"--disk {directory} is no directory: make it, or give another one", path=directory)
            speed = _core.measure_disk(directory, _DISK_BYTES, _DISK_SECONDS)
            taken = run_probe("update", threads=self._threads, offload=f"nvme:{directory}", format="split")
            without = run_probe("update", threads=self._threads, offload="cpu", format="split")
            work = max(0.0, taken["processor_seconds"] - without["processor_seconds"]) / self._threads / taken["bytes"]
            found = Disk(speed.read, speed.write, taken["bytes"] / taken["seconds"], work, time.time())
            self._found.disks[key] = found
            self._save()
        rates = ", ".join(
            f"{each / 1e9:.2f} GB/s {what}"
            for what, each in (("read", found.read), ("written", found.write), ("moved by an update", found.update))
        )
        self.taken.append(f"disk {directory}: {rates}, measured {age(found.taken)}")
        return found

    def keep_plans(self, plans: Mapping[str, Planned]) -> None:
        """Keeps what was planned, for the runs that follow it."""
        for key, each in plans.items():
            self._found.plans.pop(key, None)
            self._found.plans[key] = each
        self._save()

    def _save(self) -> None:
        self._found.save(self._path, self._key)


def _fresh_seconds() -> float:
    """Of a byte: what the first touch of memory takes that the system gives, and giving it back, beside touching it."""
    pages = _FRESH_BYTES // mmap.PAGESIZE
    touch = bytes(pages)
    fresh, again = [], []
    for _ in range(3):
        begun = time.perf_counter()
        memory = mmap.mmap(-1, _FRESH_BYTES)
        memory[:: mmap.PAGESIZE] = touch
        used = time.perf_counter()
        memory[:: mmap.PAGESIZE] = touch
        again.append(time.perf_counter() - used)
        begun += again[-1]
        memory.close()
        fresh.append(time.perf_counter() - begun)
    return max(0.0, min(fresh) - min(again)) / _FRESH_BYTES
