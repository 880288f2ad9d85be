"""Copies between host memory and the device that computes: each way on a stream of its own, in an order made of events.

Host memory that a copy touches belongs to the copy until its event has come: whoever uses it next waits for that first.
Memory that the device can read in place (`register`) is copied as it lies; everything else passes through page-locked
blocks, of which there are a fixed number, so that what copies take of host memory is known from the start.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from zeroxide.device.health import DeviceHealth
from zeroxide.device.placement import HOST, address, device_room, is_capturing, is_host
from zeroxide.errors import DeviceError

__all__ = [
    "BLOCKS",
    "BLOCK_BYTES",
    "Cuda",
    "Download",
    "Transfers",
    "blocks_down",
    "pinned_bytes",
    "room_for",
    "room_for_state",
]

logger = logging.getLogger("zeroxide")

BLOCK_BYTES = 4 << 20
"""Bytes of a page-locked block; torch rounds such memory up to a power of two."""
BLOCKS = 4
"""Blocks for each direction, at the least."""
MOST_BLOCKS = 32
"""At the most, for copies down."""
LEAVING_BYTES = 128 << 20
"""Of what is copied down in place, so many bytes may be on the device besides the last two tensors."""


def blocks_down(nbytes: int) -> int:
    """How many blocks copies down have, where tensors of up to `nbytes` pass through them. While one of them has room
    for itself in all that are free, who sends it down does not wait for its copy."""
    return min(max(BLOCKS, -(-nbytes // BLOCK_BYTES)), MOST_BLOCKS)


def pinned_bytes(device: torch.device, down: int = BLOCKS) -> int:
    """Host bytes that the copies to and from `device` keep locked, with so many blocks for copies down."""
    return 0 if is_host(device) else (BLOCKS + down) * BLOCK_BYTES


@contextmanager
def room_for(nbytes: int, name: str, device: torch.device) -> Iterator[None]:
    """Within it the weights called `name` get `nbytes` on the device. Raises DeviceError where it has none left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = device_room(device)
        raise DeviceError(
            f"{device} has no room for {nbytes} bytes of weights of {name}: {free} of {total} bytes are free; let "
            "weights leave the device with zero_optimization.stage 3 and offload_param, cut units with "
            "zeroxide.unit_bytes, or take smaller batches",
            device=device.index,
            what=name,
            need=nbytes,
            free=free,
            total=total,
        ) from error


@contextmanager
def room_for_state(name: str, device: torch.device, planned: Mapping[str, int]) -> Iterator[None]:
    """Within it the unit `name` gets its optimizer state on the device, which is `planned` to have so many bytes, by
    bucket. Raises DeviceError where it has none left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = device_room(device)
        need = sum(planned.values())
        parts = ", ".join(f"{each} {size}" for each, size in planned.items() if size)
        raise DeviceError(
            f"{device} has no room for the optimizer state of {name}: {need} bytes are planned there ({parts}), and "
            f"{free} of {total} are free now; let the CPU update more, with a smaller zeroxide.device_memory or with "
            'zero_optimization.offload_optimizer.device "cpu" and a larger ratio',
            device=device.index,
            what=name,
            need=need,
            free=free,
            total=total,
        ) from error


class Registry(Protocol):
    """Makes host memory known to a device, so that it copies from and to it without the host's help."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Locks the memory in place; returns why that failed, or None."""

    def unregister(self, address: int) -> str | None:
        """Ends it; returns why that failed, or None."""


class Cuda:
    """Registration by the driver, in torch's context. An error of the driver's stays with the call that had it; one of
    the runtime's would be met by the next kernel of torch's."""

    def __init__(self, driver: Any = None) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1") if driver is None else driver

    def register(self, address: int, nbytes: int) -> str | None:
        """See `Registry`."""
        code = self._driver.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(0))
        return None if code == 0 else f"cuMemHostRegister: error {code}"

    def unregister(self, address: int) -> str | None:
        """See `Registry`."""
        code = self._driver.cuMemHostUnregister(ctypes.c_void_p(address))
        return None if code == 0 else f"cuMemHostUnregister: error {code}"


REGISTRIES: dict[str, Callable[[], Registry]] = {"cuda": Cuda}
"""By the kind of device; a device without one copies through blocks."""


class _Place:
    """Host memory that the device copies to and from, by the event of the last copy that touched it."""

    def __init__(self) -> None:
        self.event: torch.Event | None = None

    def wait(self) -> None:
        """Waits until no copy touches the memory."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class _Block(_Place):
    """A page-locked block."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=HOST, pin_memory=True)


class Download:
    """What a copy down has brought, or is bringing: `values`, flat in host memory, may be read after `wait`.

    The device's memory that is copied from is kept until then, or until `let_go`.
    """

    def __init__(self, place: _Place, values: torch.Tensor, source: torch.Tensor, stream: torch.Stream) -> None:
        self.place = place
        self.values = values
        self._source: torch.Tensor | None = source
        self._stream = stream
        """The stream whose memory the source is."""

    @property
    def held(self) -> int:
        """Bytes of the device that are kept."""
        return 0 if self._source is None else self._source.nbytes

    def wait(self) -> torch.Tensor:
        """The values, once they are there."""
        self.place.wait()
        self._source = None
        return self.values

    def let_go(self) -> None:
        """Keeps the device's memory no longer: its stream waits for the copy, and whoever gets the memory comes after
        that."""
        if self._source is not None and self.place.event is not None:
            self._stream.wait_event(self.place.event)
        self._source = None


class Transfers:
    """All copies of one engine to and from one device, counted in bytes. down: blocks for copies down.

    What asks the device raises DeviceError once that is lost. What gives its memory back does not.
    """

    def __init__(self, health: DeviceHealth, down: int = BLOCKS) -> None:
        self.health = health
        self.device = device = health.device
        self.bytes_up = 0
        self.bytes_down = 0
        self.held = self.most_held = 0
        """Bytes of weights that have memory on the device, now and at the most."""
        self.stowed_up = 0
        """Bytes of tensors that have come back from host memory, where they were `stowed_down`."""
        self.stowed_down = 0
        self._up, self._down = torch.Stream(device), torch.Stream(device)
        self._rising = [_Block() for _ in range(BLOCKS)]
        """Blocks for copies up, that used longest ago first."""
        self._free = [_Block() for _ in range(down)]
        """Blocks for copies down that nothing lies in."""
        self._leaving: deque[Download] = deque()
        """Copies down in place whose sources are kept, those that began first at the front."""
        make = REGISTRIES.get(device.type)
        self._registry = None if make is None else make()
        self._registered: dict[int, int] = {}
        self._last: torch.Event | None = None
        """After the last copy up in place."""
        self._last_restored: torch.Event | None = None
        """After the last `restore`, until the stream down has waited for it."""

    def stream(self) -> torch.Stream:
        """The stream that the model computes on: the caller's current one."""
        return torch.accelerator.current_stream(self.device)

    def mark(self) -> torch.Event:
        """An event after all that the model's stream has been given so far."""
        try:
            return self.stream().record_event()
        except RuntimeError as error:
            self.health.examine(error)
            raise

    def refuse_capture(self) -> None:
        """Raises DeviceError while the model's stream is captured: a graph repeats copies, and not the host's part."""
        if is_capturing(self.device):
            raise DeviceError(
                "a CUDA graph is being captured: weights and gradients move between host and device in every step, "
                "with work of the host between, which a graph does not repeat; run the engine outside of the capture",
                device=self.device.index,
            )

    # Up -------------------------------------------------------------------------------------------------------------

    def register(self, memory: torch.Tensor, name: str) -> bool:
        """Lets the device copy from and to `memory` in place until `close`; False, with one line, where it cannot.

        Nothing may change the memory while a copy from it is under way: see `wait_up`.
        """
        if self._registry is None or not memory.nbytes:
            return False
        problem = self._registry.register(address(memory), memory.nbytes)
        if problem is None:
            self._registered[address(memory)] = memory.nbytes
            return True
        logger.warning(
            "%d bytes of %s cannot be locked in place, and are copied through blocks of %d bytes: %s; raise the limit "
            "of locked memory (ulimit -l)",
            memory.nbytes,
            name,
            BLOCK_BYTES,
            problem,
        )
        return False

    def allocate(self, storage: torch.UntypedStorage, nbytes: int, name: str) -> None:
        """Gives an empty storage of the device its memory, which the next copies up may fill.

        Raises DeviceError where the device has none left for the weights called `name`.
        """
        with self.health.doing(f"weights of {name} got memory"), self._up, room_for(nbytes, name, self.device):
            storage.resize_(nbytes)
        self.held += nbytes
        self.most_held = max(self.most_held, self.held)

    def free(self, storage: torch.UntypedStorage) -> None:
        """Takes a storage's memory, which what comes later on the stream up may get: that waits for what the model's
        stream has been given so far.

        It waits here, and not where memory is next asked for: torch has few streams, and hands them out in turn, so
        that somebody else's may be the same one.
        """
        try:
            self._up.wait_event(self.mark())
        except DeviceError:
            if not self.health.lost:
                raise
        self.held -= storage.nbytes()
        storage.resize_(0)

    def send_up(self, source: torch.Tensor, target: torch.Tensor, after: torch.Event | None) -> torch.Event:
        """Copies flat bytes into as many on the device, on the stream up; returns the event that follows.

        after: the last use of what `target` has, if that is not known to be over. `source` may change at once where it
        is not registered, and after `wait_up` where it is.
        """
        with self.health.doing("weights went up"):
            if after is not None:
                self._up.wait_event(after)
            in_place = address(source) in self._registered
            if in_place:
                with self._up:
                    target.copy_(source, non_blocking=True)
            else:
                for start in range(0, source.numel(), BLOCK_BYTES):
                    self._send_block(source[start : start + BLOCK_BYTES], target[start : start + BLOCK_BYTES])
            event = self._up.record_event()
        self.bytes_up += source.numel()
        if in_place:
            self._last = event
        return event

    def send_up_parts(
        self,
        parts: Sequence[torch.Tensor],
        take: Callable[[int, torch.Tensor], None],
        name: str,
        after: torch.Event | None,
    ) -> torch.Event:
        """As `send_up`, for flat bytes that the device makes something else of: the copy of each of `parts`, which may
        change at once, is given to `take` with its number, on the stream up, and is gone after that."""
        with self.health.doing("weights went up"):
            if after is not None:
                self._up.wait_event(after)
            for number, part in enumerate(parts):
                with self._up, room_for(part.nbytes, name, self.device):
                    there = torch.empty(part.numel(), dtype=torch.uint8, device=self.device)
                for start in range(0, part.numel(), BLOCK_BYTES):
                    self._send_block(part[start : start + BLOCK_BYTES], there[start : start + BLOCK_BYTES])
                with self._up:
                    take(number, there)
                self.bytes_up += part.numel()
            return self._up.record_event()

    def _send_block(self, source: torch.Tensor, target: torch.Tensor) -> None:
        block = self._next_rising()
        memory = block.memory[: source.numel()]
        memory.copy_(source)
        with self._up:
            target.copy_(memory, non_blocking=True)
        block.event = self._up.record_event()

    def _next_rising(self) -> _Block:
        """The block for copies up that was used longest ago, once no copy touches it."""
        block = self._rising.pop(0)
        self._rising.append(block)
        block.wait()
        return block

    def wait_up(self) -> None:
        """Waits until every copy up in place has been made: registered memory may change."""
        if self._last is not None:
            with self.health.doing("weights went up"):
                self._last.synchronize()
            self._last = None

    # Down -----------------------------------------------------------------------------------------------------------

    def has_free(self) -> bool:
        """Whether the next `bring_down` finds a free block."""
        return bool(self._free)

    def bring_down(self, source: torch.Tensor) -> Download:
        """Begins to copy `source`, contiguous on the device and at most `BLOCK_BYTES`, after all that its stream has
        been given so far. The block is taken until `give_back`."""
        with self.health.doing("gradients came down"):
            block = self._free.pop()
            flat = source.view(-1)
            values = block.memory[: source.nbytes].view(source.dtype)
            self._down.wait_event(self.stream().record_event())
            with self._down:
                values.copy_(flat, non_blocking=True)
            block.event = self._down.record_event()
        self.bytes_down += source.nbytes
        return Download(block, values, source, self.stream())

    def bring_into(self, source: torch.Tensor, target: torch.Tensor) -> Download:
        """Begins to copy `source`, flat on the device, into as much registered memory, after all that its stream has
        been given so far. The host waits for nothing: where much is leaving, that stream waits for what left first."""
        with self.health.doing("gradients came down"):
            stream, place = self.stream(), _Place()
            self._down.wait_event(stream.record_event())
            with self._down:
                target.copy_(source, non_blocking=True)
            place.event = self._down.record_event()
            self.bytes_down += source.nbytes
            self._leaving = deque(each for each in self._leaving if each.held)
            # What left last may be large, and has had no time yet.
            held = sum(each.held for each in self._leaving) - (self._leaving[-1].held if self._leaving else 0)
            while held > LEAVING_BYTES:
                first = self._leaving.popleft()
                held -= first.held
                first.let_go()
        self._leaving.append(Download(place, target, source, stream))
        return self._leaving[-1]

    def values_of(self, download: Download) -> torch.Tensor:
        """What has come down, once it is there."""
        with self.health.doing("gradients came down"):
            return download.wait()

    def give_back(self, download: Download) -> None:
        """Ends the use of what has come down."""
        self.values_of(download)
        if isinstance(download.place, _Block):
            self._free.append(download.place)

    # Down and up again ----------------------------------------------------------------------------------------------

    def stow(self, source: torch.Tensor, pieces: Sequence[torch.Tensor], ready: torch.Event) -> torch.Event:
        """Copies flat bytes of the device into as many of the host, on the stream down, once `ready` has come; returns
        the event that follows. The source stays as it is until then. For what goes to memory that is not locked, the
        host waits."""
        with self.health.doing("activations came down"):
            if self._last_restored is not None:
                # Whatever was brought up from these pieces before.
                self._down.wait_event(self._last_restored)
                self._last_restored = None
            self._down.wait_event(ready)
            at = 0
            with self._down:
                for memory in pieces:
                    memory.copy_(source[at : at + memory.numel()], non_blocking=True)
                    at += memory.numel()
            stowed = self._down.record_event()
        self.stowed_down += source.numel()
        return stowed

    def restore(self, pieces: Sequence[torch.Tensor], target: torch.Tensor, stowed: torch.Event) -> torch.Event:
        """Copies what was stowed, when that event had come, into flat bytes of the device that were taken on the
        current stream, on the stream up; returns the event that follows. Whoever frees the target lets its stream wait
        for that first."""
        with self.health.doing("activations went up"):
            self._up.wait_event(self.stream().record_event())
            self._up.wait_event(stowed)
            at = 0
            with self._up:
                for memory in pieces:
                    target[at : at + memory.numel()].copy_(memory, non_blocking=True)
                    at += memory.numel()
            self._last_restored = self._up.record_event()
        self.stowed_up += target.numel()
        return self._last_restored

    def close(self) -> None:
        """Waits for every copy, unless the device is lost, and lets go of the memory that was registered. Idempotent.

        What goes from here on of the memory that came by the stream up is in use no more.
        """
        try:
            if not self.health.lost:
                with self.health.doing("the engine ended"):
                    self._up.wait_event(self.stream().record_event())
                    self._up.synchronize()
                    self._down.synchronize()
        except DeviceError as error:
            if not self.health.lost:
                raise
            logger.warning("%s", error)
        finally:
            self._unregister()

    def _unregister(self) -> None:
        left, problem = 0, None
        while self._registry is not None and self._registered:
            start, nbytes = self._registered.popitem()
            said = self._registry.unregister(start)
            if said is not None:
                left, problem = left + nbytes, said
        if problem is not None:
            logger.warning("%d bytes of host memory stay locked until the process ends: %s", left, problem)
