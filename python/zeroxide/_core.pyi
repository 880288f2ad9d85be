"""Rust core of zeroxide."""

from collections.abc import Sequence
from inspect import Signature
from os import PathLike
from typing import Any, ClassVar, Never, Self, final, type_check_only

import torch
from typing_extensions import disjoint_base

__all__ = [
    "ACTIVITIES",
    "CUDA_DRIVER",
    "DEFAULT_STAGING_BYTES",
    "DEFAULT_TILE_ELEMENTS",
    "FRAME",
    "NVRTC_OPTIONS",
    "RULES",
    "Bringer",
    "Commits",
    "CommittedReads",
    "CudaContext",
    "CudaKernel",
    "CudaProbe",
    "DeviceRequest",
    "DiskSpeed",
    "EarlyUpdates",
    "FileChecksum",
    "FileQueue",
    "GradientHome",
    "GradientHook",
    "IoEngine",
    "KeptCubin",
    "MeshPosition",
    "Nvrtc",
    "Offload",
    "PinnedMemory",
    "Plan",
    "Quantisation",
    "Recorder",
    "Rule",
    "Settings",
    "StateHome",
    "TensorSpec",
    "Transport",
    "UnitSpec",
    "WeightHome",
    "Window",
    "__version__",
    "add_message",
    "checksum",
    "decode_moment",
    "decode_weights",
    "dequantise_message",
    "drop_clean_text",
    "drop_pages_of_files",
    "encode_moment",
    "encode_weights",
    "expand_message",
    "formats",
    "heap_bytes",
    "instruction_set",
    "keep_freed_memory",
    "kernel_headers",
    "kernel_source",
    "measure_disk",
    "message_bytes",
    "probe_cuda",
    "probe_storage",
    "quantise_message",
    "read_cubin",
    "reset_peak",
    "resident",
    "round_bf16",
    "shrink_gradients",
    "state_tensors",
    "update_state",
]

__version__: str
CUDA_DRIVER: str
NVRTC_OPTIONS: list[str]
DEFAULT_STAGING_BYTES: int
DEFAULT_TILE_ELEMENTS: int
FRAME: int
ACTIVITIES: list[str]

@disjoint_base
class Rule:
    """The base of all optimizer rules, which cannot be made. A rule is made with all of its hyperparameters by name."""

    rule: ClassVar[str | None]
    """What a parameter group calls it."""

    def __new__(cls, *positional: Never, **hyperparameters: float) -> Self: ...
    @property
    def values(self) -> dict[str, float]:
        """The hyperparameters that it was made with, by name."""
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...

@type_check_only
class _OneRule(Rule):
    __signature__: ClassVar[Signature]
    hyperparameters: ClassVar[dict[str, float]]
    """The usual value of each."""

RULES: dict[str, type[_OneRule]]
"""The class of each rule, by what a parameter group calls it."""

# Every rule's class is also a name of the module. Those stand here that code names.
class Adam(_OneRule): ...
class Lion(_OneRule): ...
class Adagrad(_OneRule): ...
class SGD(_OneRule): ...

@final
class WeightHome:
    """Where the live weights of a unit are at home."""

    HOST: ClassVar[WeightHome]
    DISK: ClassVar[WeightHome]
    SHARD: ClassVar[WeightHome]
    BORROWED: ClassVar[WeightHome]
    def __new__(cls, word: str, /) -> WeightHome: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class StateHome:
    """Where the optimizer state of a unit is at home."""

    HOST: ClassVar[StateHome]
    DISK: ClassVar[StateHome]
    DEVICE: ClassVar[StateHome]
    def __new__(cls, word: str, /) -> StateHome: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class GradientHome:
    """Where the gradients of a unit wait for the step: "disk" if its state is there, "consumed" if they do not."""

    HOST: ClassVar[GradientHome]
    DISK: ClassVar[GradientHome]
    CONSUMED: ClassVar[GradientHome]
    def __new__(cls, word: str, /) -> GradientHome: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Transport:
    """How gradients reach the ranks that keep them."""

    SHARED: ClassVar[Transport]
    COLLECTIVE: ClassVar[Transport]
    def __new__(cls, word: str, /) -> Transport: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class IoEngine:
    """What moves bytes between memory and disk."""

    AUTO: ClassVar[IoEngine]
    IO_URING: ClassVar[IoEngine]
    THREADS: ClassVar[IoEngine]
    def __new__(cls, word: str, /) -> IoEngine: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class UnitSpec:
    """One unit: its parameters as (elements, trainable), the homes of weights and state, and how it is updated.

    A format that rounds needs `streams`, the random bits of each parameter. `mesh` is None for a unit that all ranks
    train.
    """

    def __new__(
        cls,
        *,
        name: str,
        params: list[tuple[int, bool]],
        weights: WeightHome,
        state: StateHome,
        optimizer: Rule,
        format: str,
        held_through_backward: bool = False,
        gradients: GradientHome | None = None,
        streams: list[int] = ...,
        mesh: MeshPosition | None = None,
    ) -> UnitSpec: ...

@final
class MeshPosition:
    """This process's place among those that train one model."""

    def __new__(cls, *, rank: int, shards: int, replicas: int, transport: Transport) -> MeshPosition: ...

@final
class Quantisation:
    """What travels between ranks as integers: `near` ranks in a row are a group, 0 for all; `weights` of each unit."""

    def __new__(
        cls, *, near: int = 0, weights: Sequence[bool] = ..., gradients: bool = False, feedback: bool = False
    ) -> Quantisation: ...

@final
class Settings:
    """Everything else that a core needs to know. `*_bytes` and `limit` are bytes; `mesh` is None for one rank;
    `durable` is (name, value) of what a run must have in common with the one that it continues, None for a run that
    leaves nothing."""

    def __new__(
        cls,
        *,
        limit: int | None,
        threads: int,
        compute: str,
        grad: str,
        tile_elements: int,
        staging_bytes: int,
        gathered_bytes: int,
        engine: IoEngine,
        queue_depth: int,
        directories: list[Any],
        job: str,
        shares: list[int] = ...,
        mesh: MeshPosition | None = None,
        comm_dtype: str | None = None,
        quantisation: Quantisation | None = None,
        reduce_scale: float = 1.0,
        defers_steps: bool = False,
        speculates: bool = False,
        durable: list[tuple[str, str]] | None = None,
    ) -> Settings: ...

@final
class TensorSpec:
    """Address, length and dtype of a contiguous CPU tensor, and the tensor itself, which keeps the memory alive.

    Raises ModelError where it is not contiguous, not in host memory, not fp32, bf16, fp16, int64 or uint8, or has its
    negative bit set.
    """

    def __new__(cls, tensor: torch.Tensor, /) -> TensorSpec: ...
    @property
    def tensor(self) -> torch.Tensor:
        """The tensor itself."""

@final
class GradientHook:
    """Gives the gradient of a parameter to the core as soon as torch has accumulated it.

    unit, missing, reducer: a `Unit`, its positions whose gradients are outstanding, and the `Reducer` that is asked for
    its `divisor`, told of a unit that is not `open` (`check_open`) or has everything (`complete`), and given what is no
    dense gradient in host memory (`accumulate_unusual`).
    """

    def __new__(
        cls, offload: Offload, unit: object, position: int, missing: set[int], open: object, reducer: object, /
    ) -> GradientHook: ...
    def __call__(self, param: torch.Tensor) -> None: ...
    @property
    def seconds(self) -> float:
        """Seconds that calls have taken so far, with what the reducer does in them."""
    @property
    def core_seconds(self) -> float:
        """Seconds of those in which the core took a gradient."""

@final
class Window:
    """The address range of one unit's flat weights. Readable only while the unit is gathered."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

@final
class EarlyUpdates:
    """Updates of single units inside of backward, each as soon as the unit's gradients are complete; `Offload.step`
    updates the others and ends the step."""

    def __new__(cls, offload: Offload, /) -> EarlyUpdates: ...
    def begin(self, groups: list[Rule], grad_scale: float, *, speculates: bool = False) -> None: ...
    def update(self, unit: int) -> None: ...
    def take_back(self) -> bool: ...
    def fail(self, cause: str) -> bool: ...

@final
class Offload:
    """Units of parameters, their tiers, and the optimizer over them."""

    def __new__(cls, settings: Settings, units: list[UnitSpec], /) -> Offload: ...
    def window(self, unit: int) -> Window | None: ...
    def param_offset(self, unit: int, param: int) -> int: ...
    def set_group(self, unit: int, param: int, group: int) -> None: ...
    def set_lazy(self, unit: int) -> None: ...
    def fill_begin(self, unit: int, part: str) -> None: ...
    def fill_param(self, unit: int, param: int, start: int, values: TensorSpec) -> None: ...
    def fill_bytes(self, unit: int, param: int, start: int, bytes: TensorSpec) -> None: ...
    def read_bytes(self, unit: int, param: int, start: int, out: TensorSpec) -> None: ...
    def write_bytes(self, unit: int, param: int, start: int, bytes: TensorSpec) -> None: ...
    def fill_commit(self, unit: int) -> None: ...
    def write_param(self, unit: int, param: int, part: str, start: int, values: TensorSpec) -> None: ...
    def read_param(self, unit: int, param: int, part: str, start: int, out: TensorSpec) -> None: ...
    def updates(self, unit: int, param: int) -> int: ...
    def set_updates(self, unit: int, param: int, updates: int) -> None: ...
    def segment_handle(self) -> tuple[int, int] | None: ...
    def join(self, handles: list[tuple[int, int]]) -> None: ...
    def cancel(self, line: str, ranks: Sequence[int]) -> None: ...
    def send(self, unit: int) -> None: ...
    def receive(self, unit: int, wait: bool) -> bool: ...
    def outgoing(self, unit: int) -> tuple[int, int]: ...
    def incoming(self, unit: int) -> tuple[int, int]: ...
    def receive_from(self, unit: int) -> None: ...
    def receive_sum(self, unit: int, sums: TensorSpec) -> None: ...
    def room(self, name: str) -> tuple[int, int]: ...
    def kept_gradients(self, unit: int) -> tuple[int, int]: ...
    def accumulated(self) -> bytes: ...
    def set_accumulated(self, accumulated: bytes) -> None: ...
    def shard(self, unit: int) -> tuple[int, int]: ...
    def pieces(self, unit: int) -> list[tuple[int, int, int]]: ...
    def kept_pieces(self, unit: int) -> list[tuple[int, int, int]]: ...
    def gather(self, unit: int, covered: bool = False) -> bool: ...
    def beside(self, unit: int) -> Window | None: ...
    def cover(self, unit: int) -> None: ...
    def bringer(self) -> Bringer: ...
    def set_all_shards_valid(self, unit: int) -> None: ...
    def gather_ahead(self, unit: int, covered: bool = False) -> bool | None: ...
    def has_room(self, unit: int) -> bool: ...
    def prefetch(self, unit: int) -> bool: ...
    def watch_readers(self) -> None: ...
    def rewrite_weights(self, unit: int) -> None: ...
    def release(self, unit: int) -> None: ...
    def accumulate(self, unit: int, param: int, start: int, grad: TensorSpec, norm: bool) -> None: ...
    def accumulate_rows(self, unit: int, param: int, count: int, rows: TensorSpec, grad: TensorSpec) -> None: ...
    def gradient_room(self, unit: int, param: int) -> tuple[int, int] | None: ...
    def gradient_arrived(self, unit: int, param: int) -> None: ...
    def has_gradient(self, unit: int, param: int) -> bool: ...
    def note_gradient(self, unit: int, param: int) -> bool: ...
    def note_norm(self, unit: int, param: int, sum_squares: float, nonfinite: bool) -> None: ...
    def fail_step(self, cause: str, begun: bool) -> None: ...
    def check_usable(self) -> None: ...
    def away_runs(self, unit: int, groups: list[Rule]) -> list[tuple[int, int, int, int, int]]: ...
    def grad_norm(self) -> tuple[float, bool, int]: ...
    def clear_gradients(self) -> None: ...
    def lend(self, unit: int, weight: TensorSpec, grad: TensorSpec) -> None: ...
    def step(self, groups: list[Rule], grad_scale: float) -> None: ...
    def finish(self) -> None: ...
    def usage(self) -> dict[str, tuple[int, int]]: ...
    def io(self) -> dict[str, Any] | None: ...
    def recorder(self) -> Recorder: ...
    def close(self, readers: list[int] | None = None) -> None: ...

@final
class Commits:
    """Makes commits of one `Offload`, and goes back to the last one."""

    def __new__(cls, core: Offload, /) -> Commits: ...
    def found(self) -> list[int]: ...
    def adopt(self, generation: int) -> str | None: ...
    def prepare(self, note: str) -> int: ...
    def conclude(self) -> None: ...
    def roll_back(self) -> None: ...
    def reads(self) -> CommittedReads: ...

@final
class CommittedReads:
    """Reads the last commit while training goes on."""

    def read_param(self, unit: int, param: int, part: str, start: int, out: TensorSpec) -> None: ...
    def read_bytes(self, unit: int, param: int, start: int, out: TensorSpec) -> None: ...
    def close(self) -> None: ...

@final
class Recorder:
    """Records what a core does and when, while it is on. `start` takes how many of the newest events it keeps; `stop`
    returns them in the order in which they began, with the number of those that it has not kept, or None where it was
    off. An event is six little-endian u64: its place in `ACTIVITIES`, begin, end, bytes, 0 or its unit and one, thread.
    Times are those of `time.monotonic_ns()`, threads those of `threading.get_native_id()`."""

    def start(self, events: int) -> None: ...
    def stop(self) -> tuple[bytes, int] | None: ...

@final
class DeviceRequest:
    """What is asked of a device that computes: whether all `weights_stay` there, the `limit` of bytes on it, and the
    `share` (0 to 1) of the optimizer state that is at home there, or the `room` in bytes that it fills beside weights.
    """

    def __new__(
        cls, *, weights_stay: bool, limit: int | None = None, share: float | None = None, room: int | None = None
    ) -> DeviceRequest: ...

@final
class Plan:
    """Where every byte of a training state lies, and what a step exchanges."""

    def __new__(
        cls,
        *,
        units: list[tuple[str, list[tuple[int, bool]], bool, Rule, str, int]],
        rank: int,
        shards: int,
        replicas: int,
        stage: int,
        transport: str,
        compute: str,
        grad: str,
        comm: str,
        weights_on_disk: bool,
        state_on_disk: bool,
        prefetch: int,
        gradients: GradientHome | None = None,
        pinned: int = 0,
        quantisation: Quantisation | None = None,
        tile_bytes: int | None = None,
        staging_bytes: int | None = None,
        limit: int | None = None,
        resident: int = 0,
        device: DeviceRequest | None = None,
        apart: list[tuple[int, int, int, int]] = ...,
    ) -> Plan:
        """apart: (unit, rank, shards, replicas) of units that not all ranks train."""
    @property
    def weights(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def gradients(self) -> str: ...
    @property
    def states(self) -> list[str]: ...
    @property
    def device_buckets(self) -> dict[str, int] | None: ...
    @property
    def tile_elements(self) -> int: ...
    @property
    def staging_bytes(self) -> int: ...
    @property
    def gathered_bytes(self) -> int: ...
    @property
    def disk_bytes(self) -> int: ...
    @property
    def durable_bytes(self) -> int: ...
    @property
    def spilled_bytes(self) -> int: ...
    @property
    def speculation_traffic(self) -> tuple[int, int]: ...
    @property
    def buckets(self) -> dict[str, int]: ...
    @property
    def padded(self) -> list[tuple[int, int]]: ...
    @property
    def codes(self) -> list[tuple[int, int]]: ...
    @property
    def residuals(self) -> list[tuple[int, int]]: ...
    def peak_buckets(self, loaded: bool) -> dict[str, int]: ...
    def expected_process(
        self, made: int, peak: int, resident: int, heap_growth: int, loaded: bool, updated: bool
    ) -> int: ...
    def disk_traffic(self, passes: list[tuple[bool, list[int]]] = ...) -> tuple[int, int]: ...
    def collectives(self, passes: list[tuple[bool, list[int]]] = ...) -> list[tuple[str, str, int, int, int]]: ...
    def sent_bytes(self, passes: list[tuple[bool, list[int]]] = ...) -> int: ...
    def across_bytes(self, passes: list[tuple[bool, list[int]]] = ...) -> int: ...

@final
class Bringer:
    """Readers of weights that no call gathered and that lie in parts on several ranks, one after the other."""

    def listen(self) -> bool: ...
    def take(self) -> int | None: ...
    def answer(self, problem: str | None = None) -> None: ...
    def close(self) -> None: ...

@final
class DiskSpeed:
    """What the disk of a directory can do."""

    @property
    def engine(self) -> str:
        """The engine of the queue and why it was chosen."""
    @property
    def direct(self) -> bool:
        """Whether transfers bypass the page cache."""
    @property
    def write(self) -> float:
        """Bytes a second."""
    @property
    def read(self) -> float:
        """Bytes a second."""

@final
class CudaProbe:
    """What a machine has of CUDA."""

    @property
    def version(self) -> tuple[int, int] | None: ...
    @property
    def devices(self) -> int: ...
    @property
    def problem(self) -> str | None: ...

@final
class Nvrtc:
    """The run-time compiler."""

    def __new__(cls, libraries: list[str]) -> Nvrtc: ...
    @property
    def version(self) -> tuple[int, int]: ...
    @property
    def library(self) -> str: ...
    @property
    def architectures(self) -> list[int]: ...
    def compile(
        self,
        name: str,
        text: str,
        headers: list[tuple[str, str]],
        *,
        architecture: int,
        cache: str | PathLike[str],
        options: list[str] | None = None,
    ) -> KeptCubin: ...

@final
class KeptCubin:
    """Machine code that came out of a file or from the compiler."""

    @property
    def cubin(self) -> bytes: ...
    @property
    def log(self) -> str: ...
    @property
    def compiler(self) -> tuple[int, int]: ...
    @property
    def cached(self) -> bool: ...
    @property
    def problem(self) -> str | None: ...
    def file(self) -> bytes: ...

@final
class CudaContext:
    """This process's part in a device's primary context, which torch uses as well."""

    def __new__(cls, device: int, library: str = ...) -> CudaContext: ...
    @property
    def device(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def architecture(self) -> int: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def driver_version(self) -> tuple[int, int]: ...
    def memory(self) -> tuple[int, int]: ...
    def load(self, source_name: str, kept: KeptCubin, entry: str) -> CudaKernel: ...
    def host_memory(self, nbytes: int, registered: bool = True) -> PinnedMemory: ...

@final
class CudaKernel:
    """A kernel that is loaded."""

    def usage(self) -> tuple[int, int, int | None]: ...
    def launch(self, blocks: int, threads: int, shared_bytes: int, stream: int, args: bytes) -> None: ...

@final
class PinnedMemory:
    """Host memory that a device copies from and to by itself, as a Python buffer."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

@final
class FileChecksum:
    """CRC-64/NVME of the bytes of uint8 tensors that came so far, one after the other."""

    def __new__(cls) -> FileChecksum: ...
    def update(self, bytes: TensorSpec) -> None: ...
    def copy(self, bytes: TensorSpec, into: TensorSpec) -> None:
        """Copies what comes next and takes it in. Raises ValueError for room of another size or in it."""

    def hexdigest(self) -> str: ...

@final
class FileQueue:
    """Transfers between uint8 tensors and files that run while the caller goes on: block bytes at a time, at most depth
    of them in the kernel, by io_uring ("uring"), a pool of workers ("threads") or what the kernel allows ("auto")."""

    def __new__(cls, engine: str, depth: int, workers: int, block: int) -> FileQueue: ...
    def read(self, bytes: TensorSpec, path: str | PathLike[str], offset: int) -> None: ...
    def write(self, bytes: TensorSpec, path: str | PathLike[str], offset: int) -> None: ...
    def wait(self) -> int: ...
    @property
    def pending(self) -> int: ...
    def describe(self) -> str: ...

def message_bytes(elements: int, bits: int) -> int:
    """Bytes of a message of so many elements, whole blocks of 256, with codes of 8 or 4 bits."""

def quantise_message(values: TensorSpec, dtype: str, bits: int, message: TensorSpec) -> None:
    """Quantises elements, given as a uint8 tensor of their bytes, into a message."""

def dequantise_message(message: TensorSpec, bits: int, values: TensorSpec, dtype: str) -> None:
    """Brings a message back as elements, in a uint8 tensor of their bytes."""

def expand_message(room: TensorSpec, dtype: str, bits: int) -> None:
    """Brings the message that ends a room back in place: afterwards the elements fill it."""

def shrink_gradients(
    room: TensorSpec, dtype: str, residual: TensorSpec | None = None, factor: float = 1.0, beta: float = 0.0
) -> None:
    """Quantises elements in place, to a message of 4 bits at the start of their room."""

def add_message(sums: TensorSpec, message: TensorSpec) -> None:
    """Adds what a message of 4 bits stands for to fp32 sums."""

def checksum(bytes: TensorSpec, /) -> int: ...
def encode_weights(
    format: str, compute: str, values: TensorSpec, live: TensorSpec, exact: TensorSpec | None = None
) -> None:
    """Stores fp32 values as live weights and what makes those exact, given as uint8 tensors of their bytes."""

def decode_weights(
    format: str, compute: str, out: TensorSpec, live: TensorSpec, exact: TensorSpec | None = None
) -> None:
    """The values that these have, as an update would take them."""

def encode_moment(optimizer: Rule, format: str, compute: str, name: str, values: TensorSpec, bytes: TensorSpec) -> None:
    """Stores fp32 values of a rule's own tensor, from the start of a block on, rounded to the nearest."""

def decode_moment(optimizer: Rule, format: str, compute: str, name: str, bytes: TensorSpec, out: TensorSpec) -> None:
    """The values that those bytes stand for."""

def update_state(
    optimizer: Rule,
    number: int,
    grad_scale: float,
    format: str,
    compute: str,
    tensors: list[TensorSpec],
    grad: TensorSpec,
    stream: int = 0,
    first: int = 0,
) -> None:
    """Step `number`, from 1 on, of a rule over the bytes of state tensors in host memory, in place."""

def round_bf16(values: TensorSpec, out: TensorSpec) -> None:
    """Rounds fp32 values to bf16 as the exact formats do, half up."""

def instruction_set() -> str:
    """The instruction set that the kernels run on: "baseline", "avx2" or "avx512"."""

def measure_disk(directory: str | PathLike[str], nbytes: int, seconds: float) -> DiskSpeed:
    """Writes and reads a temporary file of at most `nbytes` in a directory, each for at most about `seconds`.

    Raises StorageError where the directory cannot be used.
    """

def drop_clean_text() -> int: ...
def drop_pages_of_files(tensor: TensorSpec) -> int: ...
def formats() -> list[str]: ...
def heap_bytes() -> int: ...
def keep_freed_memory(largest: int | None = None) -> bool: ...
def kernel_headers() -> list[tuple[str, str]]: ...
def kernel_source(name: str) -> str | None: ...
def probe_cuda(library: str = ...) -> CudaProbe: ...
def probe_storage(libraries: Sequence[str], directory: str | PathLike[str], *, driver: str = ...) -> None: ...
def read_cubin(
    path: str | PathLike[str],
    name: str,
    text: str,
    headers: list[tuple[str, str]],
    *,
    architecture: int,
    options: list[str] | None = None,
) -> KeptCubin | None:
    """Machine code in a file, if it was made of `text` for that architecture; None where there is none, or of something
    else. Raises DeviceError where the file is damaged."""

def reset_peak() -> bool: ...
def resident() -> dict[str, int]: ...
def state_tensors(optimizer: Rule, format: str, compute: str) -> list[tuple[str, str, int, float]]: ...
