"""What a forward and a backward take, found from shapes: memory beside the weights, operations, FLOPs.

The pass is rehearsed with outlines (`outline.py`): no weight and no activation has memory. Memory is what torch asks of
its allocator: the bytes of every storage from its first tensor to its last. What an operation takes inside of itself is
not seen, nor what the allocator rounds up. Gradients of weights count from the operation that makes them to the end of
their accumulation, and those of weights of `LARGE` elements or more as the part that the engine makes at a time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from zeroxide.profiling.outline import Outline, become_outline
from zeroxide.profiling.stowing import Stowing

__all__ = ["LARGE", "PART", "Operation", "Pass", "Rehearsal", "TensorForm", "rehearse"]

LARGE = 8 << 20
"""Elements of a weight whose gradient the engine makes in parts, as `zero/reduce/large_weights.py` has it."""
PART = 2 << 20
"""Elements of a part, about."""


@dataclass(frozen=True)
class TensorForm:
    """A tensor argument: what is needed to make another like it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last, as many as its memory has at least."""
        if 0 in self.shape:
            return 0
        reach = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return reach * self.dtype.itemsize


@dataclass(frozen=True)
class Operation:
    """An operation with its arguments, tensors as their forms: equal where it costs the same."""

    name: str
    """As `aten.mm.default`."""
    key: str
    """The name and all arguments, as text."""
    func: Any = field(compare=False, repr=False)
    args: Any = field(compare=False, repr=False)
    kwargs: Any = field(compare=False, repr=False)
    flops: int = field(compare=False, default=0)
    """Two a multiply-accumulate; 0 for what is done element by element."""
    nbytes: int = field(compare=False, default=0)
    """Of all tensors that it reads and makes; 0 for views, which touch none."""


@dataclass
class Pass:
    """What forward, or backward, does."""

    operations: Counter[Operation] = field(default_factory=Counter)
    made: Counter[int] = field(default_factory=Counter)
    """How many blocks of memory of so many bytes are asked for."""

    def made_from(self, least: int) -> int:
        """Bytes of all blocks of `least` bytes and more."""
        return sum(size * count for size, count in self.made.items() if size >= least)

    @property
    def flops(self) -> int:
        """Of all operations."""
        return sum(each.flops * count for each, count in self.operations.items())


@dataclass
class Rehearsal:
    """What a micro-batch takes."""

    forward: Pass
    backward: Pass
    kept: int
    """Bytes of activations at the end of forward: what backward needs."""
    peak: int
    """Most bytes beside weights and kept gradients at any time."""
    stowed: int = 0
    """Bytes that leave memory between forward and backward, where activations do."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes and operations while it is on."""

    def __init__(self, large: set[tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.into = Pass()
        self.in_backward = False
        self._large = large
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        part = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                part |= self.note(tensor)
        # Of a large weight the engine adds up rows, or a part at a time: only the product is as much work as here.
        if not (part and func not in flop_registry and func.overloadpacket not in flop_registry):
            self.into.operations[_operation(func, args, kwargs, result)] += 1
        return result

    def leave_out(self, tensors: Iterator[torch.Tensor]) -> None:
        """These are there anyway, and do not count."""
        for tensor in tensors:
            self._storages[_storage(tensor)._cdata] = _storage(tensor)

    def note(self, tensor: torch.Tensor) -> bool:
        """Counts the memory of a result, once. Returns whether it is the gradient of a large weight."""
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._storages:
            return False
        part = self.in_backward and tuple(tensor.shape) in self._large
        nbytes = PART * tensor.itemsize if part else storage.nbytes()
        self._storages[key] = weakref.ref(storage, self._freed(key, nbytes))
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        self.into.made[nbytes] += 1
        return part

    def _freed(self, key: int, nbytes: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self._storages.pop(key, None)
            self.live -= nbytes

        return freed


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.form if isinstance(tensor, Outline) else tensor).untyped_storage()


def _operation(func: Any, args: Any, kwargs: Any, result: Any) -> Operation:
    forms = tree_map_only(torch.Tensor, _form, (args, kwargs))
    name = str(func)
    tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
    view = func.is_view or name in ("aten._unsafe_view.default", "aten.detach.default")
    formula = flop_registry.get(func.overloadpacket) or flop_registry.get(func)
    return Operation(
        name=name,
        key=f"{name}{forms}",
        func=func,
        args=forms[0],
        kwargs=forms[1],
        flops=int(formula(*args, **kwargs, out_val=result)) if formula else 0,
        nbytes=0 if view else sum(each.numel() * each.itemsize for each in tensors),
    )


def _form(tensor: torch.Tensor) -> TensorForm:
    return TensorForm(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def rehearse(module: nn.Module, loss: Callable[[], torch.Tensor], stowed_from: int | None = None) -> Rehearsal:
    """Rehearses `loss`, a forward of `module` to a scalar, and its backward; or to another tensor, whose gradient comes
    from somewhere else and counts.

    module: on the meta device; it is made of outlines afterwards, and of no other use. stowed_from: bytes from which
    activations are elsewhere between forward and backward; None leaves them. Raises what its code does.
    """
    become_outline(module)
    params = list(module.parameters())
    shapes = [tuple(param.shape) for param in params if param.requires_grad and param.numel() >= LARGE]
    recorder = _Recorder({each for shape in shapes for each in (shape, shape[::-1])})
    recorder.leave_out(_storage_owners(module))
    stowing = Stowing(_storage_owners(module), stowed_from or 0, recorder.note)
    with recorder, _freeing_gradients(params):
        with nullcontext() if stowed_from is None else stowing.hooks():
            result = loss()
        forward, kept = recorder.into, recorder.live
        recorder.into, recorder.in_backward = Pass(), True
        result.backward(None if result.numel() == 1 else torch.ones_like(result))  # type: ignore[no-untyped-call]
    return Rehearsal(forward, recorder.into, kept, recorder.peak, stowing.nbytes)


def _storage_owners(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextmanager
def _freeing_gradients(params: list[nn.Parameter]) -> Iterator[None]:
    """Within it a weight's gradient ends as soon as it is made, as the engine takes it over."""

    def take(param: torch.Tensor) -> None:
        param.grad = None

    trained = [param for param in params if param.requires_grad]
    handles = [param.register_post_accumulate_grad_hook(take) for param in trained]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
