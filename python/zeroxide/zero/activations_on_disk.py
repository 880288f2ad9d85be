"""Activations that autograd saves in host memory wait for their backward in a file (`activation_file.py`).

A tensor is copied out when it is saved, and its memory is free when forward lets go of it. Backward asks in reverse
order; each is copied into memory of its own when it is asked for. What is kept is a storage, once, however many views
of it are saved, with the version that it had; of a view of less than half of a storage, the bytes that it covers alone.

Memory that torch's allocator has not given is not copied: a window of weights, a mapped file, an array of NumPy's. It
would not be free afterwards. With a budget part of what is saved stays in memory: see `Budget`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from zeroxide.device.placement import HOST, in_host_memory
from zeroxide.errors import ModelError
from zeroxide.zero.activation_file import ActivationFile, Piece
from zeroxide.zero.stowed_view import StowedView

__all__ = ["MIN_BYTES", "ActivationsOnDisk", "Budget"]

logger = logging.getLogger("zeroxide")

MIN_BYTES = 1 << 16
"""Tensors of less memory stay: there are few bytes in all of them, and each takes as long to note."""

AHEAD = 2
"""Segments that are on their way from the disk while one is in use."""


class _Saved:
    """Bytes that have been saved: of a storage, from byte `first` on."""

    __slots__ = (
        "__weakref__",
        "ended",
        "first",
        "handed",
        "held",
        "key",
        "nbytes",
        "pieces",
        "storage",
        "version",
        "views",
    )

    def __init__(self, flat: torch.Tensor, version: int, key: _Key, ended: deque[_Ended]) -> None:
        self.storage = _weak(flat.untyped_storage())
        """Lets no other storage have its address."""
        self.key = key
        self.first = key[1]
        self.nbytes = flat.numel()
        self.version = version
        self.pieces: list[Piece] | None = None
        """Where they are in the file; None where they stay in memory."""
        self.held: torch.Tensor | None = None
        """The bytes in memory, flat: those that stay there, or that have come back and will be asked for again."""
        self.handed: StorageWeakRef | None = None
        """What has come back and been given to autograd."""
        self.views = 0
        self.ended = ended

    def __del__(self) -> None:
        self.ended.append((self.key, self.pieces, self.nbytes))


_Key = tuple[int, int, int]
"""A storage by its address, and the first and the last byte of it."""
_Ended = tuple[_Key, list[Piece] | None, int]


class Budget:
    """How much of what is saved stays in memory.

    The first step sends everything to the disk. What it took shows how many bytes are left of the budget, and how many
    activations there are. From then on as many of the first ones of a pass go to the disk as have no room, while
    forward goes on, and the last ones, with which backward begins, stay.

    room: bytes of memory for activations, once that is known.
    """

    def __init__(self, room: Callable[[], int | None]) -> None:
        self._room = room
        self.room: int | None = None
        self.kept = 0
        """Bytes that are in memory now."""
        self.stowed = 0
        """Bytes that are in the file now."""
        self._peak = 0
        self.most = 0
        """The most of both at once, in the last pass."""

    def begin(self) -> None:
        """A forward begins."""
        if self.room is None:
            self.room = self._room()
        if not self.kept and not self.stowed:
            self.most, self._peak = self._peak, 0

    def keeps(self, nbytes: int) -> bool:
        """Whether memory has room for so many bytes more, which count from now on."""
        room = self.room or 0
        stays = self.stowed >= self.most - room and self.kept + nbytes <= room
        if stays:
            self.kept += nbytes
        else:
            self.stowed += nbytes
        self._peak = max(self._peak, self.kept + self.stowed)
        return stays

    def end(self, nbytes: int, *, stayed: bool) -> None:
        """Nobody needs so many bytes any more."""
        if stayed:
            self.kept -= nbytes
        else:
            self.stowed -= nbytes


class ActivationsOnDisk:
    """What one engine keeps of its activations.

    buffers: those of the model, which stay where they are. budget: what part of them stays in memory; None is none.
    """

    def __init__(
        self, file: ActivationFile, buffers: Callable[[], Iterable[torch.Tensor]], budget: Budget | None
    ) -> None:
        self.file = file
        self.budget = budget
        self._buffers = buffers
        self._buffered: set[int] | None = None
        """Addresses of the buffers' storages in this forward, once somebody has asked."""
        self._lock = threading.RLock()
        self._known: dict[_Key, weakref.ref[_Saved]] = {}
        self._ended: deque[_Ended] = deque()
        """Of what nobody keeps any more."""
        self._is_full = False
        """Whether a tensor has stayed in memory for want of room in the file, which has been said."""
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Bytes of host memory: of the buffers, and of what stays by the budget."""
        return self.file.nbytes + (0 if self.budget is None else self.budget.kept)

    def begin(self) -> None:
        """A forward begins, with buffers that may be others."""
        with self._lock:
            self._buffered = None
            self._collect()
            if self.budget is not None:
                self.budget.begin()

    def keep(self, tensor: torch.Tensor) -> StowedView | None:
        """What to save for the tensor; None if it is to stay as it is. Raises StorageError where the disk refuses."""
        if type(tensor) is not torch.Tensor or not in_host_memory(tensor) or tensor.is_inference():
            return None
        storage = tensor.untyped_storage()
        if tensor.is_neg() or tensor.is_conj() or not tensor.numel() or not storage.resizable():
            return None
        first, end = _range(tensor, storage.nbytes())
        if end - first < MIN_BYTES:
            return None
        key = storage._cdata, first, end
        with self._lock:
            self._collect()
            known = self._known.get(key, _nothing)()
            if known is not None and known.version == tensor._version:
                return StowedView(tensor, known, first // tensor.itemsize)
            if self._buffered is None:
                self._buffered = {each.untyped_storage()._cdata for each in self._buffers()}
            if self._closed or storage._cdata in self._buffered or self._has_no_room(end - first):
                return None
            flat = torch.empty(0, dtype=torch.uint8, device=HOST).set_(storage)[first:end]
            saved = _Saved(flat, tensor._version, key, self._ended)
            if self.budget is not None and self.budget.keeps(saved.nbytes):
                saved.held = flat
            else:
                # Known to be in the file also where that fails.
                saved.pieces = []
                saved.pieces += self.file.append(flat)
            self._known[key] = weakref.ref(saved)
            return StowedView(tensor, saved, first // tensor.itemsize)

    def bring(self, view: StowedView) -> torch.Tensor:
        """The tensor as it was saved. Raises ModelError after `close`, StorageError where the disk fails."""
        saved = view.stowed
        assert isinstance(saved, _Saved), "it has been kept here"
        with self._lock:
            if self._closed:
                raise ModelError("backward after the engine was destroyed: its activations have gone with it")
            self._collect()
            storage = self._storage_of(saved)
            first = saved.first if saved.pieces is None else 0
            if storage is None:
                assert saved.pieces, "what is not in memory is in the file"
                held = torch.empty(saved.nbytes, dtype=torch.uint8, device=HOST)
                self.file.fetch(saved.pieces, held)
                self.file.read_ahead(saved.pieces[0], AHEAD)
                storage = held.untyped_storage()
                if saved.views > 1:
                    saved.held = held
                else:
                    # Nobody else will ask for it, unless the graph is kept.
                    saved.handed = _weak(storage)
            empty = torch.empty(0, dtype=view.dtype, device=HOST)
            return empty.set_(storage, view.offset + first // view.dtype.itemsize, view.shape, view.stride)

    def end_backward(self) -> None:
        """A backward has ended, and its graph may be gone."""
        with self._lock:
            self._collect()

    def close(self) -> None:
        """What is saved is lost, and the file is gone."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._known.clear()
                self.file.close()

    def _storage_of(self, saved: _Saved) -> torch.UntypedStorage | None:
        """Where the bytes are in memory."""
        if saved.held is not None:
            return saved.held.untyped_storage()
        if saved.handed is not None:
            found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(saved.handed.cdata)
            return found
        return None

    def _collect(self) -> None:
        """Takes back what nobody keeps any more."""
        while self._ended:
            key, pieces, nbytes = self._ended.popleft()
            if self._known.get(key, _nothing)() is None:
                self._known.pop(key, None)
            if pieces:
                self.file.release(pieces)
            if self.budget is not None:
                self.budget.end(nbytes, stayed=pieces is None)

    def _has_no_room(self, nbytes: int) -> bool:
        room = self.file.room()
        if room is None or nbytes <= room:
            return False
        if not self._is_full:
            self._is_full = True
            logger.warning(
                "zeroxide.activation_disk: the file of %d bytes in %s has no room for more activations: the rest stays "
                "in memory; raise activation_disk, or take smaller batches",
                (self.file.limit or 0) * self.file.size,
                self.file.directory,
            )
        return True


def _range(tensor: torch.Tensor, nbytes: int) -> tuple[int, int]:
    """The bytes of a storage of `nbytes` that are saved for a tensor over it, which is not empty: from, to."""
    reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if 2 * reach * tensor.itemsize >= nbytes:
        return 0, nbytes
    first = int(tensor.storage_offset()) * tensor.itemsize
    return first, first + int(reach) * tensor.itemsize


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _nothing() -> None:
    return None
