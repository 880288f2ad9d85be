"""`deepspeed.utils.logger` and what writes to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from zeroxide import _core
from zeroxide.integrations.deepspeed.accelerator import get_accelerator
from zeroxide.integrations.deepspeed.comm import get_rank

__all__ = ["log_dist", "logger", "print_rank_0", "see_memory_usage"]

logger = logging.getLogger("zeroxide")


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Logs `message` on the ranks in `ranks`; on all with None, or where -1 is one of them."""
    rank = get_rank()
    if ranks is None or -1 in ranks or rank in ranks:
        logger.log(level, "[Rank %d] %s", rank, message)


def print_rank_0(message: str, debug: bool = False, force: bool = False) -> None:
    """Logs `message` on rank 0, if `debug` or `force` says so."""
    if (debug or force) and get_rank() == 0:
        logger.info("%s", message)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Logs, on rank 0 and if `force` says so, what this process and its device have in use."""
    if not force or get_rank() != 0:
        return
    resident = _core.resident()
    used = ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in resident.items())
    used += f", device {get_accelerator().memory_allocated() / 2**30:.2f} GiB"
    logger.info("%s: %s", message, used)
