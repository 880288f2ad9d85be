"""The directories that an engine's state is dealt out over, and how fast each one's disk is beside the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.errors import StorageError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan

__all__ = ["directories_of", "measured_shares"]

logger = logging.getLogger("zeroxide")

BYTES, SECONDS = 64 << 20, 0.2
"""Of a measurement, in each direction: at most."""


def directories_of(plan: Plan, config: Config) -> list[Path]:
    """Each once: those of weights and of optimizer state where these are on disk, then `zeroxide.disks`."""
    homes = ((config.zero.offload_param, plan.weights), (config.zero.offload_optimizer, plan.state))
    found = [offload.path for offload, home in homes if home is Home.DISK and offload.path is not None]
    return list(dict.fromkeys([*found, *config.zeroxide.disks])) if found else []


def measured_shares(directories: Sequence[Path]) -> list[int]:
    """MB a second that each directory gets when as much is read as written, as a step does; empty where nothing is to
    be divided.

    Directories of one file system are served by one disk, which is measured once and gives each of them an equal part;
    where there is no other disk, nothing is measured.

    Raises StorageError for a directory that is not there and cannot be made, or cannot be written to.
    """
    if len(directories) < 2:
        return []
    made: list[Path] = []
    try:
        on_disk: dict[int, list[Path]] = {}
        for directory in directories:
            on_disk.setdefault(_disk_of(directory, made), []).append(directory)
        if len(on_disk) == 1:
            return [1] * len(directories)
        rates = {disk: _rate(paths[0]) / len(paths) for disk, paths in on_disk.items()}
    finally:
        for directory in made:
            # The store makes it again, and takes away at its end what it has made.
            with suppress(OSError):
                directory.rmdir()
    found = {path: rates[disk] for disk, paths in on_disk.items() for path in paths}
    shares = [max(1, round(found[directory])) for directory in directories]
    parts = ", ".join(
        f"{directory} {share} MB/s, {100 * share / sum(shares):.0f} %"
        for directory, share in zip(directories, shares, strict=True)
    )
    logger.info("disks: %s", parts)
    return shares


def _disk_of(directory: Path, made: list[Path]) -> int:
    """The number of the file system that a directory is on; one that has to be made for it is added to `made`."""
    try:
        if not directory.is_dir():
            directory.mkdir()
            made.append(directory)
        return directory.stat().st_dev
    except OSError as error:
        raise StorageError(
            f"{directory}: {error.strerror}: what is on disk is to be dealt out over it", path=directory
        ) from error


def _rate(directory: Path) -> float:
    """MB a second, of as many bytes read as written."""
    speed = _core.measure_disk(directory, BYTES, SECONDS)
    return 2 / (1 / speed.read + 1 / speed.write) / 1e6
