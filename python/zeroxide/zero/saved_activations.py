"""Activations that autograd saves on a device wait for their backward in host memory.

A tensor goes down when the next one is saved, on the stream down, while the device computes on. When one more is saved,
the model's stream waits for that copy, and the tensor's memory is free from there on: the last two saved are on the
device. The last one stays, since backward begins with it. In backward, which asks in reverse order, each is on its way
up while what was saved after it is used.

What is kept is a storage, once, however many views of it are saved, with the version that it had. A tensor's place in
host memory lasts as long as autograd keeps what it was given for it: until its node has run, or its graph is dropped.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from zeroxide.device.host_pool import HostPool, Lent
from zeroxide.device.transfers import Transfers
from zeroxide.errors import ModelError
from zeroxide.zero.stowed_view import StowedView, count_of_changes

__all__ = ["MIN_BYTES", "SavedActivations"]

logger = logging.getLogger("zeroxide")

MIN_BYTES = 1 << 20
"""Storages smaller than this stay on the device: their copies would take longer to begin than to make."""


class _Copies:
    """What copies of one storage may still use: outlives it, until the streams are in order."""

    __slots__ = ("arrived", "joined", "key", "lent", "serial", "source", "stowed", "target")

    def __init__(self, source: torch.Tensor, lent: Lent, serial: int) -> None:
        self.key = source.untyped_storage()._cdata
        self.serial = serial
        """Counts storages in the order in which they are saved."""
        self.source: torch.Tensor | None = source
        """The bytes that were saved, flat on the device, until they are in host memory."""
        self.lent = lent
        self.stowed: torch.Event | None = None
        """After the copy down."""
        self.target: torch.Tensor | None = None
        """The bytes that have come up, flat on the device, while somebody will ask for them."""
        self.arrived: torch.Event | None = None
        """After the last copy up."""
        self.joined: set[int] = set()
        """Streams that have waited for it."""


class _Stowed:
    """A storage that has been saved."""

    __slots__ = (
        "__weakref__",
        "copies",
        "ended",
        "handed",
        "nbytes",
        "ready",
        "storage",
        "stream",
        "version",
        "versioned",
        "views",
    )

    def __init__(
        self,
        tensor: torch.Tensor,
        copies: _Copies,
        stream: torch.Stream,
        ready: torch.Event,
        ended: deque[tuple[_Copies, torch.Stream]],
    ) -> None:
        storage = tensor.untyped_storage()
        self.storage = _weak(storage)
        """Lets no other storage have its address."""
        self.nbytes = storage.nbytes()
        self.versioned, self.version = count_of_changes(tensor), tensor._version
        self.copies = copies
        self.stream = stream
        """The stream whose memory is in `source`, then in `target`."""
        self.ready = ready
        self.ended = ended
        self.handed: StorageWeakRef | None = None
        """What has come up and been given to autograd."""
        self.views = 0
        """Saved tensors over it."""

    def __del__(self) -> None:
        self.ended.append((self.copies, self.stream))


class SavedActivations:
    """What one engine keeps of its activations.

    buffers: those of the model, which stay where they are. ahead: how many tensors are brought before they are asked
    for.
    """

    def __init__(
        self, transfers: Transfers, pool: HostPool, buffers: Callable[[], Iterable[torch.Tensor]], ahead: int
    ) -> None:
        self._transfers = transfers
        self.pool = pool
        self._buffers = buffers
        self._buffered: set[int] | None = None
        """Addresses of the buffers' storages in this forward, once somebody has asked."""
        self._ahead = ahead
        self._lock = threading.RLock()
        self._serial = 0
        self._by_storage: dict[int, weakref.ref[_Stowed]] = {}
        self._in_order: dict[int, weakref.ref[_Stowed]] = {}
        """By serial number, those saved first at the front."""
        self._last: weakref.ref[_Stowed] | None = None
        """Saved last, and not sent down."""
        self._leaving: weakref.ref[_Stowed] | None = None
        """Sent down, and still on the device."""
        self._ended: deque[tuple[_Copies, torch.Stream]] = deque()
        """Of storages that nobody keeps any more."""
        self._is_full = False
        """Whether a tensor has stayed on the device for want of host memory, which has been said."""
        self._closed = False

    # Forward --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A forward begins, with buffers that may be others."""
        self._buffered = None
        self.collect()

    def keep(self, tensor: torch.Tensor) -> StowedView | None:
        """What to save for the tensor, which is no weight; None if it is to stay as it is."""
        if type(tensor) is not torch.Tensor or tensor.device != self._transfers.device:
            return None
        storage = tensor.untyped_storage()
        if storage.nbytes() < MIN_BYTES or tensor.is_neg() or tensor.is_conj() or tensor.is_inference():
            return None
        with self._lock:
            self.collect()
            known = self._by_storage.get(storage._cdata, _nothing)()
            if known is not None and known.version == tensor._version:
                return StowedView(tensor, known)
            if self._buffered is None:
                self._buffered = {each.untyped_storage()._cdata for each in self._buffers()}
            if storage._cdata in self._buffered:
                return None
            ready = self._transfers.mark()
            lent = None if self._closed else self.pool.take(storage.nbytes())
            if lent is None:
                self._say_full()
                self._send_last(None)
                return None
            return StowedView(tensor, self._stow(tensor, storage, lent, ready))

    def _stow(self, tensor: torch.Tensor, storage: torch.UntypedStorage, lent: Lent, ready: torch.Event) -> _Stowed:
        self._serial += 1
        copies = _Copies(self._flat(storage), lent, self._serial)
        stowed = _Stowed(tensor, copies, self._transfers.stream(), ready, self._ended)
        reference = weakref.ref(stowed)
        self._by_storage[storage._cdata] = self._in_order[self._serial] = reference
        self._send_last(reference)
        return stowed

    def _send_last(self, following: weakref.ref[_Stowed] | None) -> None:
        """What was saved last goes down, for something has been saved since: `following`, if that is kept, too."""
        self._let_go()
        before, self._last = self._last, following
        if before is not None and (last := before()) is not None and not self._closed:
            assert last.copies.source is not None, "what was saved last is on the device"
            if last.versioned._version != last.version:
                # Whoever asks for it is refused.
                last.copies.source = None
                return
            last.copies.stowed = self._transfers.stow(last.copies.source, last.copies.lent.pieces, last.ready)
            self._leaving = before

    def _flat(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._transfers.device).set_(storage)

    def _let_go(self) -> None:
        """The tensor that was sent down has left the device when the model's stream has come here."""
        if self._leaving is not None and (leaving := self._leaving()) is not None:
            copies = leaving.copies
            if copies.source is not None and copies.stowed is not None:
                leaving.stream.wait_event(copies.stowed)
                copies.source = None
        self._leaving = None

    def _say_full(self) -> None:
        if not self._is_full and not self._closed:
            self._is_full = True
            logger.warning(
                "activation_checkpointing.cpu_checkpointing: %d bytes of activations are in host memory, and "
                "zeroxide.host_memory has no room for more: the rest stays on %s; raise host_memory, or take smaller "
                "batches",
                self.pool.used,
                self._transfers.device,
            )

    # Backward -------------------------------------------------------------------------------------------------------

    def bring(self, view: StowedView) -> torch.Tensor:
        """The tensor as it was saved. Raises ModelError after `close`, RuntimeError where it was changed in place
        since."""
        stowed = view.stowed
        assert isinstance(stowed, _Stowed), "it has been kept here"
        with self._lock:
            if self._closed:
                raise ModelError("backward after the engine was destroyed: its activations have gone with it")
            self.collect()
            storage = self._storage_of(stowed)
            if storage is None:
                self._send_up(stowed)
                storage = self._storage_of(stowed)
                assert storage is not None, "it has just been sent up"
            self._bring_ahead(stowed.copies.serial)
            self._await(stowed, storage)
            if stowed.copies.target is not None and stowed.views == 1:
                # Nobody else will ask for it, unless the graph is kept.
                stowed.handed, stowed.copies.target = _weak(storage), None
            empty = torch.empty(0, dtype=view.dtype, device=self._transfers.device)
            return empty.set_(storage, view.offset, view.shape, view.stride)

    def _storage_of(self, stowed: _Stowed) -> torch.UntypedStorage | None:
        """Where the bytes are on the device, or will be when their copy has arrived."""
        copies = stowed.copies
        for each in (copies.source, copies.target):
            if each is not None:
                return each.untyped_storage()
        if stowed.handed is not None:
            found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(stowed.handed.cdata)
            return found
        return None

    def _send_up(self, stowed: _Stowed) -> None:
        copies = stowed.copies
        assert copies.stowed is not None, "what is not on the device has been sent down"
        stowed.stream = self._transfers.stream()
        target = torch.empty(stowed.nbytes, dtype=torch.uint8, device=self._transfers.device)
        copies.arrived = self._transfers.restore(copies.lent.pieces, target, copies.stowed)
        copies.target, stowed.handed = target, None
        copies.joined = set()

    def _bring_ahead(self, serial: int) -> None:
        """Sends up what was saved before, which is asked for next."""
        wanted = self._ahead
        for number, reference in reversed(list(self._in_order.items())):
            if wanted == 0:
                return
            stowed = reference() if number < serial else None
            if stowed is None:
                continue
            wanted -= 1
            if self._storage_of(stowed) is None and stowed.copies.stowed is not None:
                try:
                    self._send_up(stowed)
                except torch.OutOfMemoryError:
                    # It comes when it is asked for.
                    return

    def _await(self, stowed: _Stowed, storage: torch.UntypedStorage) -> None:
        """Lets what the current stream is given from here on find the bytes."""
        copies, stream = stowed.copies, self._transfers.stream()
        if copies.source is None and copies.arrived is not None and stream.stream_id not in copies.joined:
            stream.wait_event(copies.arrived)
            copies.joined.add(stream.stream_id)
            if stream != stowed.stream:
                self._flat(storage).record_stream(stream)

    # Ends -----------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that are taken."""
        return self.pool.nbytes

    def end_backward(self) -> None:
        """A backward has ended, and its graph may be gone."""
        self.collect()

    def collect(self) -> None:
        """Takes back what nobody keeps any more."""
        with self._lock:
            while self._ended:
                copies, stream = self._ended.popleft()
                self._in_order.pop(copies.serial, None)
                if self._by_storage.get(copies.key, _nothing)() is None:
                    self._by_storage.pop(copies.key, None)
                if copies.source is not None and copies.stowed is not None:
                    stream.wait_event(copies.stowed)
                if copies.target is not None and copies.arrived is not None and stream.stream_id not in copies.joined:
                    stream.wait_event(copies.arrived)
                if not self._closed:
                    self.pool.give_back(copies.lent)

    def close(self) -> None:
        """No copy is under way, and no device knows the pool any more. What is saved in host memory is lost."""
        with self._lock:
            self._closed = True
            self._ended.clear()
            self.pool.close()


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _nothing() -> None:
    return None
