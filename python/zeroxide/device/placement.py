"""Where tensors are: the only place that knows what compute memory is and takes addresses.

Compute memory is where forward and backward run. On a device with memory of its own, weights and gradients travel
between it and the core's memory (`transfers.py`); where the model computes in host memory, the core's windows are
compute memory themselves, and what is there can be given to the core by its address.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from operator import methodcaller
from typing import Any

import torch
from torch import nn

from zeroxide import _core
from zeroxide.errors import ConfigError

__all__ = [
    "DTYPE_NAMES",
    "HOST",
    "ON_PAPER",
    "address",
    "addresses",
    "autocast",
    "autocast_dtype",
    "compute_device",
    "current",
    "device_kind",
    "device_of",
    "device_room",
    "fresh_pages",
    "has_values",
    "in_host",
    "in_host_memory",
    "is_capturing",
    "is_host",
    "lies_within",
    "make_current",
    "memory_at",
    "nothing_like",
    "of_buffer",
    "plain",
    "spec",
    "storage_address",
    "to_host",
    "view_of",
    "wait_for",
    "why_lost",
    "without_autocast",
]

HOST = torch.device("cpu")
"""Where the core's memory is."""

ON_PAPER = torch.device("cuda")
"""A device with memory of its own that plans are made for, and that need not be here."""

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_ADDRESS = methodcaller("data_ptr")


def spec(tensor: torch.Tensor) -> _core.TensorSpec:
    """The memory of `tensor`, any shape, for one call into the core, which relies on it while the spec is alive.

    Raises ModelError when the tensor is not contiguous, not in host memory, not fp32, bf16, fp16, int64 or uint8, or
    has its negative bit set.
    """
    return _core.TensorSpec(tensor)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its values as they are, one after the other in memory: itself where that is so.

    What torch negates by a bit alone holds the opposites in memory.
    """
    return tensor.resolve_neg().contiguous()


def memory_at(address: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of the core as a flat tensor; valid as long as the call that gave the address says."""
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype)


def fresh_pages(nbytes: int) -> torch.Tensor:
    """Bytes in pages that nothing else lies in, which go back to the system when nothing refers to them. Raises OSError
    where it has none."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


def view_of(window: Any, dtype: torch.dtype, start: int = 0, numel: int = -1) -> torch.Tensor:
    """A window, or `numel` elements of it from byte `start` on, as a flat tensor that keeps its address range reserved.

    It shares the window's memory, and nothing but that with other views: its storage is as long as it is, so that what
    saves tensors by their storage takes these elements alone.
    """
    return torch.frombuffer(window, dtype=dtype, offset=start, count=numel)


def of_buffer(memory: Any, dtype: torch.dtype, start: int = 0, numel: int = -1) -> torch.Tensor:
    """`numel` elements (-1: all) of host memory that is no tensor's, from byte `start` on, as a flat tensor over it."""
    return torch.frombuffer(memory, dtype=dtype, offset=start, count=numel)


def is_host(device: torch.device) -> bool:
    """Whether a model that computes there computes in the core's own memory."""
    return device.type == HOST.type


def in_host_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor is where the core can read it; a meta tensor is nowhere."""
    return tensor.device.type == HOST.type


def device_kind(tensor: torch.Tensor) -> str:
    """The kind of device that the tensor is on, in torch's words: "cpu", "cuda", "meta"."""
    return tensor.device.type


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the tensor has memory at all, which one on the meta device has not."""
    return tensor.device.type != "meta"


def to_host(values: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
    """fp32 values in host memory, flat and contiguous, for the core to read; with `copy`, never the tensor's own."""
    return plain(values.detach().to(device="cpu", dtype=torch.float32, copy=copy)).view(-1)


def nothing_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of size 0, of the dtype and on the device of another."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def in_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, itself where it is there; the device has done all that its stream was given."""
    return tensor.to(HOST)


def address(tensor: torch.Tensor) -> int:
    """Where the tensor's first element is, to compare with another; 0 for one that has no element."""
    return tensor.data_ptr()


def addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    """`address` of each."""
    return [*map(_ADDRESS, tensors)]


def storage_address(tensor: torch.Tensor) -> int:
    """Where the memory begins that the tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def lies_within(tensor: torch.Tensor, first: int, end: int) -> bool:
    """Whether the tensor is in host memory and begins at an address from `first` on and before `end`."""
    return tensor.device.type == HOST.type and first <= tensor.data_ptr() < end


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """torch.autocast where the model computes, without its cache: weights change between passes."""
    return torch.autocast(device.type, dtype, cache_enabled=False)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Ends torch.autocast for a while: products are in the dtype of their factors."""
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device = HOST) -> torch.dtype | None:
    """What autocast computes in on such a device; None outside of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast_here() -> Callable[[], AbstractContextManager[Any]]:
    """What makes the caller's autocast in host memory again, in another thread; a context that does nothing outside of
    one."""
    dtype, cache = autocast_dtype(), torch.is_autocast_cache_enabled()
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(HOST.type, dtype, cache_enabled=cache)


def forked_generators(device: torch.device) -> AbstractContextManager[None]:
    """Within it torch's random generators, that of the device among them, may be set: after it they are as before."""
    if is_host(device):
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def device_of(module: nn.Module) -> torch.device | None:
    """The device other than the host that the module's first parameter on one is on; None where none is."""
    found = (each.device for each in module.parameters())
    return next((each for each in found if each.type not in (HOST.type, "meta")), None)


def compute_device(asked: str, module: nn.Module, local_rank: int) -> torch.device:
    """Where `module` is to compute: what `zeroxide.device` of the config asks for, with the index that it counts by.

    "auto" is the device that the module is on, and for a module in host memory or on the meta device the GPU of this
    rank of its host where torch sees one, else the host. Raises ConfigError for a device that torch does not have.
    """
    if asked == "auto":
        own = device_of(module)
        if own is not None:
            return own
        return torch.device("cuda", local_rank % torch.cuda.device_count()) if torch.cuda.is_available() else HOST
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise _no_device(asked, str(error).splitlines()[0]) from None
    if device.type == HOST.type:
        return HOST
    try:
        present = torch.get_device_module(device).device_count()
    except (AttributeError, RuntimeError) as error:
        raise _no_device(asked, str(error).splitlines()[0]) from None
    index = local_rank % max(1, present) if ":" not in asked else device.index
    if index >= present:
        raise _no_device(asked, f"torch sees {present}")
    return torch.device(device.type, index)


def make_current(device: torch.device) -> None:
    """Makes a device other than the host torch's current one of its kind, as `torch.cuda.set_device` does: what names
    the kind alone, and what torch makes for a context of its own, such as page-locked memory, goes there."""
    if not is_host(device):
        torch.accelerator.set_device_index(device.index)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within it a device other than the host is torch's current one, whatever a script, or an engine on another device,
    has made of that: kernels are launched on it alone."""
    return nullcontext() if is_host(device) else torch.accelerator.device_index(device.index)


def device_room(device: torch.device) -> tuple[int, int]:
    """Free bytes and all bytes of a device's memory, as its driver counts them."""
    free, total = torch.get_device_module(device).mem_get_info(device)
    return free, total


def empty_cache(device: torch.device) -> None:
    """Gives memory that torch keeps for later back to the device."""
    if not is_host(device):
        torch.accelerator.empty_cache()


def wait_for(device: torch.device) -> None:
    """Waits until a device other than the host has done all that it was given."""
    torch.accelerator.synchronize(device)


def why_lost(device: torch.device) -> str | None:
    """What a device answers that is lost to this process; None from one that is there. The host waits for nothing."""
    if is_host(device):
        return None
    try:
        torch.accelerator.current_stream(device).record_event()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def is_capturing(device: torch.device) -> bool:
    """Whether what the current stream is given goes into a graph instead of being done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _no_device(asked: str, problem: str) -> ConfigError:
    return ConfigError(
        f'zeroxide.device: there is no device "{asked}": {problem}; use "auto" or "cpu"',
        path="zeroxide.device",
        expected='"auto", "cpu", or a device that torch has',
        got=f'"{asked}"',
    )
