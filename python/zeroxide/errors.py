"""What zeroxide raises when something outside its own code is wrong.

Each error is one line that says what, where and what to do; the numbers in that line are also fields, so that a
caller need not parse text. A fault of zeroxide itself (a broken invariant) is never one of these: it stays an
`AssertionError` or a `RuntimeError` with its traceback.

Errors of the core carry every value that the core knows, under the names that the classes here list. A value that an
error does not have is None.

The command line prints `zeroxide: error: <line>` without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "CoreError",
    "DataError",
    "DeviceError",
    "InvalidValueError",
    "ModelError",
    "NumericsError",
    "PipelineError",
    "RanksError",
    "StorageError",
    "TensorError",
    "ZeroxideError",
]


class ZeroxideError(Exception):
    """Base of every error a user can act on. Its message is a single line, whatever it was made from."""

    exit_code: ClassVar[int] = 2
    """Exit status of the command line: 2 where the request was wrong, 1 where the run failed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines() if line.strip()))

    @property
    def message(self) -> str:
        """The one line, without a prefix."""
        return str(self)


class ConfigError(ZeroxideError, ValueError):
    """The config, a keyword shortcut or a command-line option is wrong.

    `path` is the dotted path of the first wrong key ("zero_optimization.stage"), `expected` and `got` describe it.
    `problems` holds one line for every wrong key that was found, this one first.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        problems: Sequence[str] = (),
        found: Sequence[ConfigError] = (),
    ) -> None:
        super().__init__(message)
        self.path = path
        self.expected = expected
        self.got = got
        self.problems = tuple(problems) or tuple(str(each) for each in found) or (str(self),)
        if found:
            # On other ranks the lines arrive, which are all that a message can carry.
            self._found = tuple(found)

    @property
    def found(self) -> tuple[ConfigError, ...]:
        """An error for every wrong key that was found where the config was read, this one first."""
        return getattr(self, "_found", (self,))


class BudgetError(ZeroxideError):
    """A byte budget cannot be kept. `need` and `limit` are bytes; `bucket` names what asked for them."""

    used: int | None = None
    """Bytes in use over all buckets."""
    unit: str | None = None
    """The unit that does not fit beside those in use."""
    held: int | None = None
    """Bytes that units in use hold."""
    capacity: int | None = None
    """Bytes that all gathered units together may take."""

    def __init__(
        self, message: str, *, need: int | None = None, limit: int | None = None, bucket: str | None = None
    ) -> None:
        super().__init__(message)
        self.need = need
        self.limit = limit
        self.bucket = bucket


class StorageError(ZeroxideError):
    """A file or directory could not be used, read, written or verified. `errno` is the system's code, if any."""

    exit_code: ClassVar[int] = 1

    reason: str | None = None
    """What the operating system said, or what is wrong with a file or a name."""
    missing: str | None = None
    """The part of `path` that does not exist."""
    need: int | None = None
    """Bytes that a full disk lacks room for."""
    free: int | None = None
    """Bytes that it has left."""
    action: str | None = None
    """What was being done, as `open`."""
    op: str | None = None
    """`read` or `write`, of a transfer."""
    offset: int | None = None
    """Where in the file, in bytes."""
    length: int | None = None
    """Bytes that were to move."""
    done: int | None = None
    """Bytes that had moved before the error."""
    bytes: int | None = None
    """Size of the file."""
    address: int | None = None
    """Where in memory."""
    align: int | None = None
    """What offset, length and address must be multiples of."""
    block: str | None = None
    """The block of a tile, as `unit 3 exp_avg`."""
    tile: int | None = None
    """Its number in the block."""
    tiles: int | None = None
    """Tiles of the block."""
    expected: int | None = None
    """Checksum or bytes that there should be."""
    got: int | None = None
    """Checksum or bytes that there were."""
    holder: str | None = None
    """Who uses the directory."""
    difference: str | None = None
    """In what the run that left it is not like this one, with both values."""
    call: str | None = None
    """What was asked of a durable store that does not go now."""
    pid: int | None = None
    """Its process."""
    job: str | None = None
    """Name of a run that cannot be that of a directory."""
    depth: int | None = None
    """Queue depth given."""
    max: int | None = None
    """The greatest one allowed."""
    created: int | None = None
    """Process that made what a forked child used."""
    current: int | None = None
    """The child."""
    step: int | None = None
    """The optimizer step that failed half way, from 1."""
    cause: str | None = None
    """What it failed with."""

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)
        self.errno = errno


class DeviceError(ZeroxideError):
    """A compute device, its driver or its compiler is missing, full, lost, or refuses what it was asked for."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        device: int | None = None,
        what: str | None = None,
        need: int | None = None,
        free: int | None = None,
        total: int | None = None,
    ) -> None:
        super().__init__(message)
        self.device, self.what, self.need, self.free, self.total = device, what, need, free, total

    device: int | None = None
    """The device's number, from 0."""
    devices: int | None = None
    """Devices that the driver shows."""
    library: str | None = None
    """The driver's or the compiler's library."""
    entry: str | None = None
    """A kernel, or the function that a library lacks."""
    found: str | None = None
    """The version that there is."""
    reason: str | None = None
    """What the driver, the loader or the operating system said."""
    tried: str | None = None
    """Where a library was looked for."""
    source_name: str | None = None
    """The source file of a kernel."""
    architecture: int | None = None
    """The compute capability, as 90 for 9.0."""
    known: str | None = None
    """Architectures that the compiler knows."""
    nvrtc: str | None = None
    """The compiler's version."""
    log: str | None = None
    """All that the compiler said, its lines joined by |."""
    call: str | None = None
    """The function that failed."""
    code: int | None = None
    """The driver's or cuFile's code for it."""
    what: str | None = None
    """What was asked for, or what a handle is of."""
    at: int | None = None
    """Which byte of a text is zero."""
    need: int | str | None = None
    """Bytes that do not fit, or the version that is needed."""
    free: int | None = None
    """Free bytes of the device."""
    total: int | None = None
    """All bytes of the device."""
    bytes: int | None = None
    """Bytes that cannot be registered."""
    limit: str | None = None
    """The limit of memory that this process may lock, in words."""
    expected: int | None = None
    """Bytes of a kernel's argument."""
    got: int | None = None
    """Bytes that were given for it."""
    step: int | None = None
    """The optimizer step that failed half way, from 1."""
    cause: str | None = None
    """What it failed with."""
    blocks: int | None = None
    """Blocks of a grid."""
    threads: int | None = None
    """Threads of a block."""
    shared_bytes: int | None = None
    """Dynamic shared memory of a block."""
    stream: int | None = None
    """A stream's handle."""
    handle: int | None = None
    """A handle that is not one of the device."""
    created: int | None = None
    """Process that made what a forked child used."""
    current: int | None = None
    """The child."""
    action: str | None = None
    """What was being done with `path`."""
    path: str | None = None
    """A file or directory of the kernel cache."""
    errno: int | None = None
    """The operating system's code."""


class ModelError(ZeroxideError):
    """The model cannot be trained as it is. `name` is the parameter or module concerned."""

    unit: str | None = None
    """The unit whose weights were read while they were not there."""
    cause: str | None = None
    """Why they could not be brought."""
    line: str | None = None
    """What an earlier call had to say."""

    def __init__(self, message: str, *, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


class PipelineError(ModelError):
    """A call that an engine of a pipeline does not take, or not now."""


class TensorError(ZeroxideError, ValueError):
    """A tensor is not what a kernel takes. `name` is the argument, `expected` and `got` what it should be and is."""

    def __init__(self, message: str, *, name: str, expected: str, got: str) -> None:
        super().__init__(message)
        self.name = name
        self.expected = expected
        self.got = got


class DataError(ZeroxideError):
    """The training data is missing, empty or too small. `path` is where it was looked for."""

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)


class CheckpointError(ZeroxideError):
    """A checkpoint is missing, incomplete, damaged or made for another model. `path` is its directory."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)


class NumericsError(ZeroxideError):
    """The loss or the gradients are not finite. `step` counts optimizer steps from 0; `value` is what was seen."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, step: int | None = None, value: float | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.value = value


class RanksError(ZeroxideError):
    """Ranks cannot be found, do not agree, or one of them is lost. `ranks` holds the ranks that the line blames."""

    exit_code: ClassVar[int] = 1

    line: str | None = None
    """Why waiting for other ranks ended, in a wait of the core."""

    def __init__(self, message: str, *, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class InvalidValueError(ValueError):
    """A value outside of what is allowed, given to the core."""

    name: str | None = None
    """The hyperparameter."""
    value: float | None = None
    """What it was."""
    expected: str | None = None
    """What is allowed, in words."""
    text: str | None = None
    """A word that is none of those known."""
    what: str | None = None
    """What a number is of."""
    got: int | None = None
    """The number."""
    quantum: int | None = None
    """What it must be a multiple of, in elements."""
    format: str | None = None
    """A state format that does not go with `dtype`."""
    dtype: str | None = None
    """The compute dtype."""
    param: int | None = None
    """A parameter, by its number in the unit."""
    params: int | None = None
    """Parameters of the unit."""
    element: int | None = None
    """An element of the parameter."""
    numel: int | None = None
    """Elements of the parameter."""


class CoreError(RuntimeError):
    """A call that the core's present state does not allow, or a broken invariant: a fault of zeroxide's own code."""

    call: str | None = None
    """The call, of the core or of the operating system."""
    what: str | None = None
    """Why it was refused, or what was asked for."""
    reason: str | None = None
    """What the operating system said."""
    errno: int | None = None
    """Its code."""
    need: int | None = None
    """Bytes or frames asked for."""
    got: int | None = None
    """What there was instead."""
    expected: str | None = None
    """What would have been accepted."""
    align: int | None = None
    """Alignment asked for, in bytes."""
    free: int | None = None
    """Free bytes of an arena."""
    largest: int | None = None
    """Bytes of its largest hole."""
    start: int | None = None
    """First byte of a range."""
    end: int | None = None
    """One past its last byte."""
    len: int | None = None
    """Bytes of a window."""
    bytes: int | None = None
    """Bytes concerned."""
    operation: str | None = None
    """What was to be done with a window."""
    state: str | None = None
    """State of the window."""
    created: int | None = None
    """Process that made what a forked child used."""
    current: int | None = None
    """The child."""
    threads: int | None = None
    """Threads asked for."""
    at: int | None = None
    """First byte of a copy."""
    count: int | None = None
    """Bytes of a copy."""
    size: int | None = None
    """Bytes of a device's memory."""
