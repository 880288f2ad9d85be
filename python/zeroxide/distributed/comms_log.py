"""The log of collectives: what each kind has carried and how long it took, on this rank.

`COMMS` is the process's own, as it is DeepSpeed's: an engine whose config has `comms_logger` switches it on, and it
stays on. Whatever exchanges something asks `COMMS.enabled` first, so that it costs one branch while it is off.

A message's size is the bytes that come to this rank from others; of what goes from or to one rank (`ONE_WAY`), those of
the tensor. Latency is from
its beginning until this rank finds it complete: what ran beside it meanwhile is in it, so that the bandwidths of what
overlaps with compute are lower bounds. Bandwidths are those of NCCL's tests (doc/PERFORMANCE.md of nccl-tests): with n
ranks, an all-gather, all-to-all or reduce-scatter of S bytes in all has the algorithm bandwidth S / t and the bus
bandwidth S / t * (n - 1) / n, where S * (n - 1) / n is what comes to a rank; an all-reduce has twice the latter; a
broadcast has S / t for both.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zeroxide.config import Config
from zeroxide.config.sections.comms_logger import OPS

if TYPE_CHECKING:
    from zeroxide.distributed.collectives import Ranks

__all__ = ["COMMS", "Began", "CommsLog", "Record", "bandwidths"]

logger = logging.getLogger("zeroxide")

ONE_WAY = frozenset({"broadcast", "gather", "recv", "reduce", "scatter", "send"})
"""Ops in which one rank has what is sent, or gets it: their size is the tensor's, and both bandwidths are one."""

LATEST = 1000
"""Latencies of each kind and size that are kept one by one, for what ranks have waited for one another."""


@dataclass(frozen=True, slots=True)
class Began:
    """A collective that is under way."""

    op: str
    name: str
    """What its line is called: the op, and what sets it apart from others of that op."""
    size: int
    """Bytes that come to this rank."""
    ranks: int
    """That take part."""
    start: float


@dataclass(slots=True)
class Record:
    """All collectives of one name and size."""

    op: str
    ranks: int
    count: int = 0
    milliseconds: float = 0.0
    """Of all of them."""
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    """Milliseconds of the last ones."""


def bandwidths(op: str, size: int, ranks: int, milliseconds: float) -> tuple[float, float]:
    """(algorithm, bus) bandwidth in gigabits a second of a collective that brought `size` bytes to each rank."""
    if milliseconds <= 0:
        return 0.0, 0.0
    bus = size * 8 / 1e6 / milliseconds
    if op in ONE_WAY or ranks < 2:
        return bus, bus
    # An all-reduce brings everything twice: as parts to be summed, and as sums.
    return bus * ranks / (ranks - 1) / (2 if op == "all_reduce" else 1), bus


class CommsLog:
    """What this rank has exchanged since it was switched on."""

    def __init__(self) -> None:
        self.enabled = False
        self.verbose = False
        self.prof_all = True
        self.prof_ops: frozenset[str] = frozenset()
        """Ops that are logged where not all are."""
        self.debug = False
        self.ranks: Ranks | None = None
        """Who takes part in a summary; None is this rank alone."""
        self.records: dict[str, dict[int, Record]] = {}
        """By name, and by size in bytes."""

    def configure(self, config: Config, ranks: Ranks) -> None:
        """Switches it on as `config` asks, among `ranks`; a config that does not ask leaves it as it is."""
        if not config.comms_logger.enabled:
            return
        self.enabled, self.ranks = True, ranks
        self.verbose, self.debug = config.comms_logger.verbose, config.comms_logger.debug
        self.prof_all = config.comms_logger.prof_all
        self.prof_ops = frozenset(OPS.get(name, name) for name in config.comms_logger.prof_ops)

    def begin(self, op: str, size: int, ranks: int, *, what: str = "", unit: str = "") -> Began | None:
        """A collective among `ranks` ranks begins that brings `size` bytes to this one; None where it is not logged.

        what: sets it apart from others of the same op. unit: of the model, in names where `debug` asks for it.
        """
        if not (self.enabled and (self.prof_all or op in self.prof_ops)):
            return None
        name = f"{op} {what}".rstrip() + (f" | {unit}" if self.debug and unit else "")
        return Began(op, name, size, ranks, time.perf_counter())

    def end(self, began: Began | None) -> None:
        """It is complete."""
        if began is None:
            return
        spent = (time.perf_counter() - began.start) * 1e3
        sizes = self.records.setdefault(began.name, {})
        record = sizes.setdefault(began.size, Record(began.op, began.ranks))
        record.count += 1
        record.milliseconds += spent
        record.latest.append(spent)
        if self.verbose and (self.ranks is None or self.ranks.rank == 0):
            algorithm, bus = bandwidths(began.op, began.size, began.ranks, spent)
            logger.info(
                "comm op: %s | time (ms): %.2f | msg size: %s | algbw (Gbps): %.2f | busbw (Gbps): %.2f",
                *(began.name, spent, said(began.size), algorithm, bus),
            )

    def reset(self) -> None:
        """Forgets what was logged."""
        self.records = {}

    def summary(self) -> dict[str, dict[int, dict[str, Any]]]:
        """By name and size, under DeepSpeed's names: count, latencies in ms, mean bandwidths in Gbps, size in bytes and
        in words. A mean bandwidth is that of all bytes in all of the time."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for name, sizes in self.records.items():
            for size, record in sorted(sizes.items()):
                mean = record.milliseconds / record.count
                algorithm, bus = bandwidths(record.op, size, record.ranks, mean)
                found.setdefault(name, {})[size] = {
                    "count": record.count,
                    "total_latency_ms": record.milliseconds,
                    "avg_latency_ms": mean,
                    "tput_avg_gbps": algorithm,
                    "busbw_avg_gbps": bus,
                    "msg_size_bytes": size,
                    "msg_size_str": said(size),
                }
        return found

    def stragglers(self) -> dict[str, dict[int, dict[str, Any]]]:
        """By name and size, of the last collectives that all ranks have: what the fastest rank of each took, and what
        this one took beyond that, which it has waited for others. Every rank calls it."""
        mine = {name: {size: [*each.latest] for size, each in sizes.items()} for name, sizes in self.records.items()}
        # JSON has no numbers for keys.
        plain = {name: {str(size): each for size, each in sizes.items()} for name, sizes in mine.items()}
        every = self._gather(plain)
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for name, sizes in mine.items():
            for size, own in sorted(sizes.items()):
                rows = [each.get(name, {}).get(str(size), []) for each in every]
                count = min(map(len, rows))
                if count:
                    fastest = [min(row[at - count] for row in rows) for at in range(count)]
                    beyond = sum(own[-count:]) - sum(fastest)
                    found.setdefault(name, {})[size] = {
                        "count": count,
                        "total_comm_lat_ms": sum(fastest),
                        "total_straggler_ms": beyond,
                        "avg_comm_lat_ms": sum(fastest) / count,
                        "avg_straggler_ms": beyond / count,
                        "msg_size_bytes": size,
                        "msg_size_str": said(size),
                    }
        return found

    def meet(self) -> None:
        """Returns once every rank has called it."""
        self._gather(None)

    def _gather(self, value: Any) -> list[Any]:
        ranks, logged = self.ranks, self.enabled
        if ranks is None or ranks.alone or ranks.group is None:
            return [value]
        self.enabled = False  # what a summary exchanges is none of what it sums up
        try:
            return ranks.gather_objects(value)
        finally:
            self.enabled = logged


COMMS = CommsLog()
"""The log of this process."""


def said(size: int) -> str:
    """Bytes in DeepSpeed's words: "1.5 KB", by powers of 1024."""
    value, units = float(size), ("B", "KB", "MB", "GB", "TB", "PB")
    unit = next((each for each, at in zip(units, range(len(units)), strict=True) if size < 1024 ** (at + 1)), units[-1])
    return f"{round(value / 1024 ** units.index(unit), 2):g} {unit}"
