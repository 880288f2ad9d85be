"""What becomes `torch.sim`: the functions that torch asks of a device module, and those that tests ask of this one."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_library: Any = None
Stream = torch.Stream
"""`torch.sim.Stream()` would be one of the current accelerator, which is this device."""
Event = torch.Event
PRIVATE_USE = torch._C._autograd.DeviceType.PrivateUse1.value


def attach(library: Any) -> None:
    """Takes the library that `build.py` has made; its functions fail by returning -1."""
    global _library
    u64, text = ctypes.c_uint64, ctypes.c_char_p
    device = ctypes.c_int
    for name, arguments in {
        "races": [ctypes.POINTER(text)],
        "waits": [ctypes.POINTER(text)],
        "forget_wait": [u64],
        "set_delay": [u64, u64, u64],
        "delay": [device, device, u64, ctypes.POINTER(u64)],
        "usage": [device, ctypes.POINTER(u64)],
        "resident": [ctypes.POINTER(u64)],
        "reset_peak": [device],
        "reset_bytes": [device],
        "set_limit": [device, u64],
        "host_access": [u64, u64, ctypes.c_bool, text],
        "register_host": [u64, u64],
        "unregister_host": [u64],
        "set_register_limit": [u64],
        "lose": [device, ctypes.c_int64],
        "begin_kernel": [text, ctypes.c_void_p, u64],
        "end_kernel": [ctypes.c_void_p, u64],
        "peek": [u64, u64, ctypes.c_void_p],
        "name_stream": [device, device, text],
        "seed": [device, u64],
        "rng_get": [device, ctypes.c_void_p],
        "rng_set": [device, ctypes.c_void_p, u64],
    }.items():
        getattr(library, f"sim_{name}").argtypes = arguments
    library.sim_error.restype = text
    library.sim_in_bad_fork.restype = library.sim_used.restype = ctypes.c_bool
    for name in ("initial_seed", "rng_bytes"):
        getattr(library, f"sim_{name}").restype = u64
        getattr(library, f"sim_{name}").argtypes = [device]
    _library = library


def _call(name: str, *arguments: Any) -> None:
    if getattr(_library, f"sim_{name}")(*arguments) != 0:
        raise RuntimeError(_library.sim_error().decode())


def _index(device: torch.device | str | int | None) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current_device() if index is None else index


# What torch asks of a device.


def is_available() -> bool:
    return True


_initialized = True
"""Checkpointing keeps the state of the generators of a device that says this."""


def is_initialized() -> bool:
    return bool(_library.sim_used())


def init() -> None:
    """Nothing is to be done: the device comes up at its first use."""


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return bool(_library.sim_in_bad_fork())


def device_count() -> int:
    return 2


def current_device() -> int:
    return torch._C._accelerator_getDeviceIndex()


def set_device(device: torch.device | str | int) -> None:
    torch._C._accelerator_setDeviceIndex(_index(device))


class device:
    """The current device is another within the context."""

    def __init__(self, device: torch.device | str | int | None) -> None:
        self._index = _index(device)
        self._before = -1

    def __enter__(self) -> None:
        self._before = torch._C._accelerator_exchangeDevice(self._index)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        torch._C._accelerator_maybeExchangeDevice(self._before)


def current_stream(device: torch.device | str | int | None = None) -> torch.Stream:
    return torch._C._accelerator_getStream(_index(device))


def default_stream(device: torch.device | str | int | None = None) -> torch.Stream:
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=PRIVATE_USE)


def set_stream(stream: torch.Stream) -> None:
    torch._C._accelerator_setStream(stream)


@contextmanager
def stream(given: torch.Stream | None) -> Iterator[None]:
    """Work goes to that stream within the context."""
    if given is None:
        yield
        return
    with given:
        yield


def synchronize(device: torch.device | str | int | None = None) -> None:
    torch._C._accelerator_synchronizeDevice(_index(device))


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def manual_seed(seed: int) -> None:
    _call("seed", current_device(), seed % 2**64)


def manual_seed_all(seed: int) -> None:
    for each in range(device_count()):
        _call("seed", each, seed % 2**64)


def initial_seed() -> int:
    return _library.sim_initial_seed(current_device())


def get_rng_state(device: torch.device | str | int | None = None) -> torch.Tensor:
    index = _index(device)
    state = torch.empty(_library.sim_rng_bytes(index), dtype=torch.uint8, device="cpu")
    _call("rng_get", index, state.data_ptr())
    return state


def set_rng_state(state: torch.Tensor, device: torch.device | str | int | None = None) -> None:
    state = state.contiguous()
    _call("rng_set", _index(device), state.data_ptr(), state.numel())


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(each) for each in range(device_count())]


def set_rng_state_all(states: list[torch.Tensor]) -> None:
    for index, state in enumerate(states):
        set_rng_state(state, index)


def empty_cache() -> None:
    """Gives the pages of free memory back to the operating system."""
    _call("empty_cache")


def memory_allocated(device: torch.device | str | int | None = None) -> int:
    """Bytes in use, each allocation rounded up to 512."""
    return usage(device).in_use


def max_memory_allocated(device: torch.device | str | int | None = None) -> int:
    return usage(device).peak


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def reset_peak_memory_stats(device: torch.device | str | int | None = None) -> None:
    _call("reset_peak", _index(device))


def mem_get_info(device: torch.device | str | int | None = None) -> tuple[int, int]:
    """Bytes that are free, and all that there are."""
    known = usage(device)
    return known.limit - known.in_use, known.limit


# What tests ask of it.


@dataclass(frozen=True)
class Usage:
    """Of a device: bytes of memory, the limit of them, allocations so far, and bytes copied from and to the host."""

    in_use: int
    peak: int
    limit: int
    allocations: int
    up: int
    down: int


def usage(device: torch.device | str | int | None = None) -> Usage:
    values = (ctypes.c_uint64 * 6)()
    _call("usage", _index(device), values)
    return Usage(*values)


def resident() -> int:
    """Bytes of device memory, in use or free again, that the system counts to this process's resident memory."""
    value = ctypes.c_uint64()
    _call("resident", ctypes.byref(value))
    return value.value


def reset_bytes(device: torch.device | str | int | None = None) -> None:
    """Copies are counted from 0 again."""
    _call("reset_bytes", _index(device))


def set_memory_limit(nbytes: int, device: torch.device | str | int | None = None) -> None:
    """More than this at once is refused with `torch.OutOfMemoryError`."""
    _call("set_limit", _index(device), nbytes)


def set_register_limit(nbytes: int) -> None:
    """More host memory than this is not registered at once, as where little may be locked."""
    _call("set_register_limit", nbytes)


def lose(after: int = 0, device: torch.device | str | int | None = None) -> None:
    """The device does so many more operations and copies, and then nothing until `reset`: whatever asks it raises."""
    _call("lose", _index(device), after)


def set_delay(low: int, high: int, seed: int = 0) -> None:
    """Copies that do not block sleep so many microseconds, drawn evenly, and anew from now on; 0 to 2000 at first."""
    _call("set_delay", low, high, seed)


def delay(given: torch.Stream, number: int) -> int:
    """What that is for a copy of the stream, counted from 0 at the last `set_delay`."""
    value = ctypes.c_uint64()
    _call("delay", given.device_index, given.stream_id, number, ctypes.byref(value))
    return value.value


@dataclass(frozen=True)
class Race:
    """Two accesses to the same bytes, one of them a write, that no wait has put in an order."""

    first: str
    first_actor: str
    first_writes: bool
    second: str
    second_actor: str
    second_writes: bool
    low: int
    high: int

    def __str__(self) -> str:
        verb = "writes" if self.second_writes else "reads"
        done = "wrote" if self.first_writes else "read"
        return (
            f"{self.second} on {self.second_actor} {verb} what {self.first} on {self.first_actor} {done}, unordered: "
            f"{self.high - self.low} bytes at {self.low:#x}"
        )


def races() -> list[Race]:
    """What no wait has ordered since the last reset: one for each pair of operations, at most 1000."""
    text = ctypes.c_char_p()
    _call("races", ctypes.byref(text))
    return [
        Race(first, where, bool(wrote), second, there, bool(writes), low, high)
        for first, where, wrote, second, there, writes, low, high in json.loads(text.value)
    ]


@dataclass(frozen=True)
class Wait:
    """A wait of the program, and whether it ordered anything that was not ordered already."""

    text: str
    needed: bool


def wait_list() -> list[Wait]:
    """The waits since the last reset.

    Among them are those of autograd between streams; not what an operator waits for by itself, such as `item`.
    """
    text = ctypes.c_char_p()
    _call("waits", ctypes.byref(text))
    return [Wait(what, bool(news)) for what, news in json.loads(text.value)]


def waits() -> int:
    """How many waits there have been since the last reset."""
    return len(wait_list())


def forget_wait(number: int) -> None:
    """The wait with this number, counted from 0 at the last reset, will have no effect: nobody waits."""
    _call("forget_wait", number)


def reset() -> None:
    """Waits for everything, and begins anew with no race, no wait, none to be forgotten, and both devices there."""
    _call("reset")


def host_access(address: int, nbytes: int, write: bool, who: str) -> None:
    """The host touches its own memory now, outside of torch: to be ordered with copies that use it."""
    _call("host_access", address, nbytes, write, who.encode())


class watch_host(TorchDispatchMode):
    """Within it, operators on tensors of the host are accesses of the host, as if announced by `host_access`.

    Copies from and to the device are known anyway. Not seen are other threads, and what works on memory without torch.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        schema = func._schema
        named = [(each, args[i] if i < len(args) else given.get(each.name)) for i, each in enumerate(schema.arguments)]
        touched = [
            (tensor, each.alias_info is not None and each.alias_info.is_write)
            for each, value in named
            if each.alias_info is None or each.alias_info.is_write
            for tensor in pytree.tree_leaves(value)
            if isinstance(tensor, torch.Tensor)
        ]
        if all(tensor.device.type == "cpu" for tensor, _ in touched):
            for tensor, write in touched:
                if tensor.numel() > 0:
                    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
                    host_access(tensor.data_ptr(), (last + 1) * tensor.element_size(), write, schema.name)
        return func(*args, **given)


def register_host(address: int, nbytes: int) -> None:
    """Makes memory of the host one that copies use while the host goes on, as `cuMemHostRegister` does."""
    _call("register_host", address, nbytes)


def unregister_host(address: int) -> None:
    """The memory may be freed afterwards: a race where a copy uses it that the host has not waited for."""
    _call("unregister_host", address)


@contextmanager
def kernel(name: str, touched: Sequence[tuple[int, int, bool]]) -> Iterator[None]:
    """Within it the host plays a kernel on the current stream, which has come so far: it may read and write device
    memory at the addresses that tensors show.

    touched: (first byte, one past the last, whether it is written) of all that the kernel touches, for the checker.
    """
    rows = [each for low, high, writes in touched if low < high for each in (low, high, int(writes))]
    given = (ctypes.c_uint64 * len(rows))(*rows)
    _call("begin_kernel", name.encode(), given, len(rows) // 3)
    try:
        yield
    finally:
        _call("end_kernel", given, len(rows) // 3)


def peek(address: int, nbytes: int) -> bytes:
    """What device memory holds when the current stream has come so far, for whoever plays a kernel."""
    out = (ctypes.c_char * nbytes)()
    _call("peek", address, nbytes, out)
    return bytes(out)


def name_stream(given: torch.Stream, name: str) -> None:
    """What races call it."""
    _call("name_stream", given.device_index, given.stream_id, name.encode())


def stop_threads() -> None:
    """Ends the threads of all streams, which must not be in use; the next use starts them again."""
    _call("stop_threads")
