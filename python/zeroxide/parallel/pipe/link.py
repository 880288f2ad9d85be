"""Values between the stages of a pipeline: activations forwards, gradients back.

A value may be another each time: its structure, shapes and dtypes go ahead of it, as JSON, wherever they are not those
that the same micro-batch had the last time. Sending never waits: what has not left is waited for at the end of the
step. So ranks that follow orders which can be followed at all never wait for one another in a circle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from zeroxide.device.placement import HOST, in_host, of_buffer, plain
from zeroxide.distributed import COMMS, Ranks, Watch
from zeroxide.errors import RanksError
from zeroxide.parallel.pipe.message import Message
from zeroxide.parallel.pipe.nesting import flatten, rebuild

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["StageLink"]

_PARTS = 3
"""Of a message: how long what goes ahead is, that itself, and the values. Each has a tag of its own."""
_MOST_AHEAD = 1 << 24
"""Bytes that structure and shapes can take."""


class StageLink:
    """What one rank of a pipeline sends to the others and receives.

    ranks: those of the pipeline, numbered from 0, with a process group that nobody else sends in.
    device: where tensors that arrive belong.
    """

    def __init__(self, ranks: Ranks, watch: Watch, stages: int, device: torch.device = HOST) -> None:
        self._ranks = ranks
        self._watch = watch
        self._stages = stages
        self._device = device
        self._sent: dict[Message, bytes] = {}
        self._received: dict[Message, tuple[Any, bytes]] = {}
        self._leaving: list[tuple[Message, Any, torch.Tensor]] = []
        self.bytes_sent = 0
        """Of values, since the link was made."""

    def send(self, message: Message, to: int, value: Any) -> None:
        """Begins to send a value (see `flatten`) to a rank; it may be forgotten here at once.

        Raises ModelError for what cannot travel, RanksError when a rank is lost.
        """
        structure, tensors = flatten(value, message.contents)
        shapes = [[list(each.shape), str(each.dtype).removeprefix("torch."), each.requires_grad] for each in tensors]
        ahead = json.dumps([structure, shapes]).encode()
        known = self._sent.get(message) == ahead
        self._sent[message] = ahead
        first = self._tag(message)
        self._leave(message, to, torch.tensor([0 if known else len(ahead)], device=HOST), first)
        if not known:
            self._leave(message, to, of_buffer(bytearray(ahead), torch.uint8), first + 1)
        for each in tensors:
            values = plain(in_host(each.detach())).contiguous()
            if values.numel():
                self._leave(message, to, values.view(-1).view(torch.uint8), first + 2)
                self.bytes_sent += values.nbytes

    def receive(self, message: Message, source: int) -> Any:
        """Waits for a value of a rank. Its tensors require a gradient as they did there.

        Raises RanksError when a rank is lost.
        """
        first = self._tag(message)
        with self._waiting(message):
            size = self._arrive(torch.zeros(1, dtype=torch.int64, device=HOST), source, first)
        length = int(size)
        if not 0 <= length <= _MOST_AHEAD:
            raise RanksError(f"{message} begins with {length} bytes of structure: ranks follow different schedules")
        if length:
            with self._waiting(message):
                ahead = bytes(self._arrive(torch.empty(length, dtype=torch.uint8, device=HOST), source, first + 1))
            self._received[message] = json.loads(ahead), ahead
        structure, shapes = self._received[message][0]
        tensors = [self._tensor(message, source, first + 2, *shape) for shape in shapes]
        return rebuild(structure, tensors)

    def _tensor(
        self, message: Message, source: int, tag: int, shape: Sequence[int], dtype: str, wants_gradient: bool
    ) -> torch.Tensor:
        found = torch.empty(shape, dtype=getattr(torch, dtype), device=HOST)
        if found.numel():
            with self._waiting(message):
                self._arrive(found.view(-1).view(torch.uint8), source, tag)
        found = found.to(self._device)
        return found.requires_grad_(wants_gradient) if wants_gradient else found

    def drain(self) -> None:
        """Waits until everything has left. Raises RanksError when a rank is lost."""
        while self._leaving:
            message, work, _ = self._leaving[0]
            if not work.is_completed():
                with self._waiting(message):
                    work.wait()
            del self._leaving[0]

    def forget(self) -> None:
        """Nothing that was known of values holds any more, on any rank of the pipeline: they call it together."""
        self._sent.clear()
        self._received.clear()

    def abandon(self) -> None:
        """Lets go of what has not left: a rank is lost, or this one failed."""
        self._leaving.clear()

    def _leave(self, message: Message, to: int, values: torch.Tensor, tag: int) -> None:
        import torch.distributed as dist

        self._leaving = [each for each in self._leaving if not each[1].is_completed()]
        logged = COMMS.begin("send", values.nbytes, 2, what=message.kind) if COMMS.enabled else None
        with self._waiting(message):
            work = dist.isend(values, group=self._group, group_dst=to, tag=tag)
        COMMS.end(logged)
        self._leaving.append((message, work, values))

    def _arrive(self, into: torch.Tensor, source: int, tag: int) -> torch.Tensor:
        import torch.distributed as dist

        work = dist.irecv(into, group=self._group, group_src=source, tag=tag)
        assert work is not None
        work.wait()
        return into

    @property
    def _group(self) -> ProcessGroup | None:
        return self._ranks.group

    def _tag(self, message: Message) -> int:
        return message.number(self._stages) * _PARTS

    def _waiting(self, message: Message) -> AbstractContextManager[None]:
        # With a number of its own, which is no count of calls: not all ranks make the same ones.
        words, number = message.awaited
        return self._watch.waiting(words, None, number)
