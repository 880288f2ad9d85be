"""Tensors between ranks while the model computes: messages from memory to memory, each under a tag of its own.

torch's collectives over gloo copy what they carry several times, and meet in the order in which they are called,
whatever they carry. A message is read where it lies and written where it belongs; its tag names its unit, so ranks that
do different things wait, which the watch sees, and never take one unit for another. An all-gather or all-to-all is one
message from each rank to each.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch

from zeroxide.distributed import COMMS, Began, Ranks, Watch
from zeroxide.errors import RanksError

__all__ = ["Messages", "Work"]

PIECE_BYTES = 32 << 20
LEAST_PIECE_BYTES = 1 << 20
"""What a rank's peers send at once is cut so that a piece from each is `PIECE_BYTES` together: each that arrives is a
sign of life. A network that brings less than that, of each of two works, in `rank_timeout` needs a longer one."""
LAST_WAIT = timedelta(seconds=10)
"""How long the end of the process waits for messages that are still on their way."""

KINDS = (
    "all-gather",
    "all-gather across groups",
    "all-to-all",
    "all-to-all across groups",
    "all-gather of gradients",
    "all-gather of sums",
)
LOGGED = {kind: (kind[:10].rstrip().replace("-", "_"), kind[10:].strip()) for kind in KINDS}
"""What the log of collectives calls each: its op, of 10 letters, and what sets it apart."""
# A tag is 31 bits: the highest sets ours apart from a user's; engine, unit and kind.
_OURS, _ENGINE_SHIFT, _ENGINES, _UNITS, _KIND_SHIFT = 1 << 30, 20, 1 << 10, 1 << 17, 3

_engines = itertools.count()


class Numbered(Protocol):
    """What a message is about: the same number and name on every rank."""

    @property
    def index(self) -> int:
        """Decides the tag."""

    @property
    def name(self) -> str:
        """For messages to the user."""


class Work:
    """Messages of one unit on their way. Until both waits are over, the memory they use must stay, unchanged."""

    def __init__(self, watch: Watch, kind: str, name: str, number: int, tag: int) -> None:
        self.watch = watch
        self.kind = kind
        self.name = name
        self.number = number
        self.tag = tag
        self.arriving: list[Any] = []
        self.leaving: list[Any] = []
        self.logged: Began | None = None
        """What the log of collectives has of it until it is complete."""
        self.begun = False
        """Whether all of its messages are on their way."""

    def received(self) -> None:
        """Waits until everything has arrived. Raises RanksError when a rank is lost, or the start was interrupted."""
        if not self.begun:
            raise RanksError(
                f"{self.kind} of unit {self.name} was interrupted when it began, so ranks no longer have the same: "
                "make the engine again and go on from the last checkpoint"
            )
        self._wait(self.arriving)

    def sent(self) -> None:
        """Waits until everything has left. Raises RanksError when a rank is lost."""
        self._wait(self.leaving)

    def _wait(self, works: list[Any]) -> None:
        while works:
            # gloo tells of an end once: a wait that was interrupted just after it must not be repeated.
            if not works[0].is_completed():
                # The same words on every rank, whichever of the messages it waits for.
                with self.watch.waiting(self.kind, self.name, self.number):
                    works[0].wait()
            del works[0]
        if self.logged is not None and self.begun and not (self.arriving or self.leaving):
            COMMS.end(self.logged)
            self.logged = None


class Messages:
    """What an engine sends to the other ranks and receives. All ranks make their engines in the same order."""

    def __init__(self, ranks: Ranks, watch: Watch) -> None:
        self.ranks = ranks
        self.watch = watch
        self._process = os.getpid()
        self._number = 0
        self._flights: list[Work] = []
        self._first_tag = 0 if ranks.alone else _OURS | next(_engines) % _ENGINES << _ENGINE_SHIFT

    def work(self, kind: str, unit: Numbered) -> Work:
        """A work that has no messages yet. Every rank makes the same works of a unit in the same order."""
        if unit.index >= _UNITS:
            raise ValueError(f"{unit.name} is unit {unit.index}: at most {_UNITS} have a tag")
        self._number += 1
        tag = self._first_tag | unit.index << _KIND_SHIFT | KINDS.index(kind)
        work = Work(self.watch, kind, unit.name, self._number, tag)
        self._flights = [each for each in self._flights if each.arriving or each.leaving]
        self._flights.append(work)
        return work

    def start(
        self, work: Work, incoming: Iterable[tuple[int, torch.Tensor]], outgoing: Iterable[tuple[int, torch.Tensor]]
    ) -> None:
        """Begins to receive and to send, by (rank, contiguous tensor in host memory), and returns at once.

        What one rank sends is as long as what the other expects. Raises RanksError when a rank is lost; what had begun
        by then is in the work.
        """
        import torch.distributed as dist

        group = self.ranks.group
        if COMMS.enabled:
            incoming = list(incoming)
            ranks, size = len({rank for rank, _ in incoming}) + 1, sum(tensor.nbytes for _, tensor in incoming)
            op, what = LOGGED[work.kind]
            work.logged = COMMS.begin(op, size, ranks, what=what, unit=work.name)
        with self.watch.waiting(work.kind, work.name, work.number):
            # Room first: a sender waits for it.
            for rank, tensor in incoming:
                for piece in self._pieces(tensor):
                    work.arriving.append(dist.irecv(piece, group=group, group_src=rank, tag=work.tag))
            for rank, tensor in outgoing:
                for piece in self._pieces(tensor):
                    work.leaving.append(dist.isend(piece, group=group, group_dst=rank, tag=work.tag))
            work.begun = True

    def drain(self) -> None:
        """Waits for all messages, as long as the watch finds no rank lost. A rank that is behind may take its time."""
        try:
            for work in self._flights:
                work.received()
                work.sent()
        except (RuntimeError, RanksError):
            # A rank is gone. Whoever can do something about it hears of that from the watch.
            pass

    def close(self) -> None:
        """Gives up the messages that have not arrived `LAST_WAIT` from now. Then no memory is touched.

        Where one is given up, the process group cannot be used any more.
        """
        if os.getpid() != self._process:
            return
        try:
            for work in self._flights:
                for message in work.arriving + work.leaving:
                    if self.ranks.lost is None and not message.is_completed():
                        message.wait(LAST_WAIT)
        except RuntimeError:
            pass
        finally:
            for work in self._flights:
                # gloo leaves the memory of a message alone once nobody holds its handle.
                work.arriving.clear()
                work.leaving.clear()
            self._flights.clear()

    def _pieces(self, tensor: torch.Tensor) -> Iterable[torch.Tensor]:
        most = max(LEAST_PIECE_BYTES, PIECE_BYTES // max(1, self.ranks.world - 1))
        return (tensor,) if tensor.nbytes <= most else torch.split(tensor, most // tensor.itemsize)
