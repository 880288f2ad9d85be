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
    """MB a second of each directory's disk when as much is read as written, as a step does; empty where nothing is
    to be divided.

    Raises StorageError for a directory that is not there and cannot be made, or cannot be written to.
    """
    if len(directories) < 2:
        return []
    rates = []
    for directory in directories:
        new = not directory.exists()
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{directory}: {error.strerror}: what is on disk is to be dealt out over it", path=directory
            ) from error
        try:
            speed = _core.measure_disk(directory, BYTES, SECONDS)
        finally:
            if new:
                # The store makes it again, and takes away at its end what it has made.
                with suppress(OSError):
                    directory.rmdir()
        rates.append(max(1, round(2 / (1 / speed.read + 1 / speed.write) / 1e6)))
    parts = ", ".join(
        f"{directory} {rate} MB/s, {100 * rate / sum(rates):.0f} %"
        for directory, rate in zip(directories, rates, strict=True)
    )
    logger.info("disks: %s", parts)
    return rates
