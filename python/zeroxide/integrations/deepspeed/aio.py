"""DeepSpeed's handle for reading and writing tensors asynchronously, over the queue that moves training state.

Every transfer is checked for errors and for its length, and the first that failed is raised, where DeepSpeed's handle
returns -1, prints or asserts. Transfers go past the page cache where address, length and offset are multiples of 4096.
"""

from __future__ import annotations

from pathlib import Path

import torch

from zeroxide import _core
from zeroxide.device.placement import address, in_host_memory, of_buffer, spec, storage_address
from zeroxide.errors import ConfigError, ModelError, StorageError
from zeroxide.integrations.deepspeed.locked_tensors import LockedTensors
from zeroxide.integrations.deepspeed.logging import logger

__all__ = ["AsyncIO", "aio_handle", "aio_read", "aio_write", "deepspeed_memcpy"]

_ALIGNMENT = 4096
_BLOCK = 1 << 20
_DEPTH = 128


class aio_handle:
    """Reads and writes of contiguous tensors in host memory, of any dtype, from and to files.

    block_size: bytes of one request to the kernel, a multiple of 4096. queue_depth: most requests in the kernel at a
    time. intra_op_parallelism: threads, where the kernel refuses io_uring. single_submit and overlap_events have no
    effect: io_uring takes all requests at once, and they always overlap.

    Methods raise ModelError for a tensor that cannot be moved as it is, StorageError for what the disk or the file
    refuses, a file that is too short among it.
    """

    def __init__(
        self,
        block_size: int = _BLOCK,
        queue_depth: int = _DEPTH,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        if type(block_size) is not int or block_size <= 0 or block_size % _ALIGNMENT:
            raise ConfigError(
                f"aio_handle: block_size: expected a multiple of {_ALIGNMENT} bytes, got {block_size!r}",
                path="block_size",
            )
        self._given = block_size, queue_depth, single_submit, overlap_events, intra_op_parallelism
        self._queue = _core.FileQueue("auto", queue_depth, intra_op_parallelism, block_size)
        self._locked = LockedTensors()
        self._to_compare: list[tuple[torch.Tensor, str, int]] = []
        self._moving: list[tuple[torch.Tensor, tuple[int, int]]] = []
        """Tensors of transfers under way, each with where its memory was when that began."""

    def __del__(self) -> None:
        # Nobody has waited: what was begun ends all the same, and a failure is said.
        queue = self.__dict__.get("_queue")
        if queue is None or not queue.pending:
            return
        try:
            queue.wait()
        except StorageError as error:
            logger.error("an aio_handle was let go of with transfers that nobody had waited for: %s", error)

    def get_block_size(self) -> int:
        """Bytes of one request to the kernel."""
        return self._given[0]

    def get_queue_depth(self) -> int:
        """Most requests in the kernel at a time."""
        return self._given[1]

    def get_single_submit(self) -> bool:
        """As given."""
        return self._given[2]

    def get_overlap_events(self) -> bool:
        """As given."""
        return self._given[3]

    def get_intra_op_parallelism(self) -> int:
        """As given."""
        return self._given[4]

    def get_alignment(self) -> int:
        """Bytes of which lengths are a multiple where transfers are to go past the page cache. DeepSpeed's is this
        times the threads, since it cuts a tensor into as many equal parts."""
        return _ALIGNMENT

    def async_pread(self, buffer: torch.Tensor, filename: str | int, file_offset: int = 0) -> int:
        """Begins to fill the tensor from the file, by name or by the descriptor of an open one; 0. `wait` ends it, and
        until then the tensor's memory must stay."""
        self._queue.read(spec(_bytes_of(buffer)), _path(filename), _offset(file_offset))
        self._moving.append((buffer, _memory(buffer)))
        return 0

    def async_pwrite(self, buffer: torch.Tensor, filename: str | int, file_offset: int = 0) -> int:
        """Begins to write the tensor into the file, by name or by the descriptor of an open one; 0. `wait` ends it, and
        until then the tensor and its memory must stay as they are."""
        self._queue.write(spec(_bytes_of(buffer)), _path(filename), _offset(file_offset))
        self._moving.append((buffer, _memory(buffer)))
        return 0

    def sync_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """As `async_pread` and `wait`."""
        self.async_pread(buffer, filename, file_offset)
        return self.wait()

    def sync_pwrite(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """As `async_pwrite` and `wait`."""
        self.async_pwrite(buffer, filename, file_offset)
        return self.wait()

    def pread(
        self, buffer: torch.Tensor, filename: str, validate: bool, asynchronous: bool, file_offset: int = 0
    ) -> int:
        """As `async_pread` or `sync_pread`; with `validate`, `wait` compares with what an ordinary read gives."""
        self.async_pread(buffer, filename, file_offset)
        return self._ended(buffer, filename, file_offset, validate, asynchronous)

    def pwrite(
        self, buffer: torch.Tensor, filename: str, validate: bool, asynchronous: bool, file_offset: int = 0
    ) -> int:
        """As `async_pwrite` or `sync_pwrite`; with `validate`, `wait` compares with what an ordinary read gives."""
        self.async_pwrite(buffer, filename, file_offset)
        return self._ended(buffer, filename, file_offset, validate, asynchronous)

    def read(self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """As `pread` that waits; 0."""
        self.pread(buffer, filename, validate, False, file_offset)
        return 0

    def write(self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """As `pwrite` that waits; 0."""
        self.pwrite(buffer, filename, validate, False, file_offset)
        return 0

    def wait(self) -> int:
        """Waits for all that was begun; how many transfers there were. Raises StorageError for one that failed, when
        all have ended, and ModelError where a tensor has other memory than when its transfer began."""
        (compare, self._to_compare), (moving, self._moving) = (self._to_compare, []), (self._moving, [])
        count = self._queue.wait()
        for buffer, before in moving:
            if _memory(buffer) != before:
                raise ModelError(
                    f"a tensor of shape {tuple(buffer.shape)} got other memory while a transfer of it was under way: "
                    "its bytes, those of the file, and of whatever has the old memory now, may be wrong: wait first"
                )
        for buffer, path, offset in compare:
            _compare(buffer, path, offset)
        return count

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of shape (num_elem,) of the example's dtype in locked memory, at the start of a page. Raises
        BudgetError where the process may not lock as much."""
        return self._locked.new(num_elem, example_tensor.dtype)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Lets go of one; whether it was this handle's."""
        return self._locked.free(tensor)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether the tensor lies in memory that this handle has locked. Every tensor in host memory can be moved."""
        return self._locked.holds(buffer)

    def _ended(
        self, buffer: torch.Tensor, filename: str | int, file_offset: int, validate: bool, asynchronous: bool
    ) -> int:
        if validate:
            self._to_compare.append((buffer, _path(filename), file_offset))
        return 0 if asynchronous else self.wait()


def aio_read(
    buffer: torch.Tensor,
    filename: str,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Fills the tensor from the file; 0. See `aio_handle`."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).read(buffer, filename, validate)


def aio_write(
    buffer: torch.Tensor,
    filename: str,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Writes the tensor into the file; 0. See `aio_handle`."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).write(buffer, filename, validate)


def deepspeed_memcpy(target: torch.Tensor, source: torch.Tensor) -> int:
    """Copies one tensor in host memory into another of as many elements and the same dtype; 0. Raises ModelError for
    others."""
    if (target.numel(), target.dtype) != (source.numel(), source.dtype):
        raise ModelError(
            f"deepspeed_memcpy: {source.numel()} elements of {source.dtype} into {target.numel()} of {target.dtype}"
        )
    target.view(-1).copy_(source.view(-1))
    return 0


class AsyncIO:
    """What `AsyncIOBuilder().load()` gives."""

    aio_handle = aio_handle
    aio_read = staticmethod(aio_read)
    aio_write = staticmethod(aio_write)
    deepspeed_memcpy = staticmethod(deepspeed_memcpy)


def _bytes_of(buffer: torch.Tensor) -> torch.Tensor:
    if not in_host_memory(buffer) or not buffer.is_contiguous() or buffer.is_conj() or buffer.is_neg():
        raise ModelError(
            f"expected a contiguous tensor in host memory, got {buffer.dtype} {tuple(buffer.shape)} on "
            f"{buffer.device} with strides {buffer.stride()}"
        )
    return buffer.detach().view(-1).view(torch.uint8)


def _memory(buffer: torch.Tensor) -> tuple[int, int]:
    """Where a tensor's memory begins, and its bytes."""
    return storage_address(buffer), buffer.untyped_storage().nbytes()


def _offset(file_offset: int) -> int:
    if not 0 <= file_offset < 1 << 63:
        raise ConfigError(
            f"file_offset: expected a number of bytes of at least 0, got {file_offset}", path="file_offset"
        )
    return file_offset


def _path(filename: str | int) -> str:
    return f"/proc/self/fd/{filename}" if isinstance(filename, int) else str(filename)


def _compare(buffer: torch.Tensor, path: str, offset: int) -> None:
    """Raises StorageError where the file has other bytes than the tensor."""
    moved = _bytes_of(buffer)
    if not moved.numel():
        return
    with Path(path).open("rb") as file:
        file.seek(offset)
        found = of_buffer(bytearray(file.read(moved.numel())), torch.uint8)
    if found.numel() == moved.numel() and torch.equal(found, moved):
        return
    length = min(found.numel(), moved.numel())
    differ = (found[:length] != moved[:length]).nonzero()
    first = int(differ[0]) if differ.numel() else length
    raise StorageError(
        f"{path}: the file and the tensor at {address(buffer):#x} differ from byte {offset + first} on, after a "
        "transfer that the kernel called complete"
    )
