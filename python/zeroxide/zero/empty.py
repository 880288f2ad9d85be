"""Parameters while they show no values: whatever needs the values says so instead of computing with none.

torch broadcasts a tensor of size 0, adds to it, fills it and saves it without a word. So a parameter that is empty has
a class of its own, of which an operation asks before it runs. Shapes, dtypes, gradients and hooks are answered as those
of a tensor of size 0; all else raises ModelError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from zeroxide.errors import ModelError

__all__ = ["PASSIVE", "conceal", "full_class", "operation", "reveal"]

PASSIVE = frozenset(
    {
        *("requires_grad", "grad", "dtype", "device", "is_leaf", "layout", "is_meta", "grad_fn", "is_sparse"),
        *("names", "requires_grad_", "is_floating_point", "is_complex", "__hash__", "__repr__", "_backward_hooks"),
        *("retains_grad", "register_hook", "register_post_accumulate_grad_hook", "is_cuda", "is_cpu", "_version"),
        *("element_size", "itemsize"),
    }
)
"""What can be asked of any parameter without its values."""
SHAPES = frozenset(
    {
        *("shape", "size", "numel", "nelement", "dim", "ndimension", "ndim", "__len__", "stride", "is_contiguous"),
        *("storage_offset", "nbytes", "get_device", "_post_accumulate_grad_hooks", "_grad_fn", "_base", "_is_view"),
        *("output_nr", "is_quantized", "is_nested", "is_signed", "is_inference", "is_pinned", "is_shared"),
        *("__str__", "__format__", "__dir__", "_grad", "retain_grad", "_has_compatible_shallow_copy_type"),
    }
)
"""What an empty parameter answers as a tensor of size 0."""
CONVERSIONS = frozenset({"to", "cpu", "float", "half", "bfloat16", "double", "contiguous", "type"})
"""What may leave a parameter as it is."""


class _Empty:
    """A parameter that shows no values; mixed with its class while it shows them."""

    full: type

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operation(func)
        if name in PASSIVE or name in SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in CONVERSIONS and isinstance(args[0], _Empty):
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            if found is args[0] or not isinstance(found, torch.Tensor):
                return found
        # What a module does with its parameters when it is moved to where it is.
        if name == "data" and len(args) == 2 and args[0] is args[1]:
            return None
        raise _refusal(next(_empties((args, kwargs))), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _filled(self, "copying").__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _filled(self, "pickling").__reduce_ex__(protocol)


def _filled(param: Any, what: str) -> Any:
    """The parameter with its values, where a look at it is enough to bring them: inside zero.Init."""
    with suppress(ModelError):
        _ = param.data
    if isinstance(param, _Empty):
        raise _refusal(param, what)
    return param


def _refusal(param: Any, what: str) -> ModelError:
    keeper = param._keeper
    return ModelError(
        f"{keeper.name} {tuple(keeper.shape)} is empty, and {what} needs its values: they are there while its module "
        "runs forward or backward, and inside zeroxide.zero.GatheredParameters; state_dict() has them anywhere",
        name=keeper.name,
    )


def operation(func: Any) -> str:
    """The name of an operation, or of the attribute that is read or set."""
    name: str = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name in ("__get__", "__set__") else name


def _empties(tree: Any) -> Iterator[_Empty]:
    if isinstance(tree, _Empty):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from _empties(each)
    elif isinstance(tree, dict):
        yield from _empties(list(tree.values()))


_CLASSES: dict[type, type] = {}


def _class_of(kind: type) -> type:
    """The class that a parameter of class `kind` has while it is empty."""
    made = _CLASSES.get(kind)
    if made is None:
        made = _CLASSES[kind] = type(kind.__name__, (_Empty, kind), {"full": kind, "__module__": kind.__module__})
    return made


def full_class(param: torch.Tensor) -> type:
    """The class that the parameter has while it shows values."""
    kind = type(param)
    return kind.full if issubclass(kind, _Empty) else kind


def reveal(param: nn.Parameter, data: torch.Tensor) -> None:
    """Lets the parameter show `data`, of its dtype."""
    kind = type(param)
    if issubclass(kind, _Empty):
        param.__class__ = kind.full
    param.data = data


def conceal(param: nn.Parameter, empty: torch.Tensor) -> None:
    """Makes a managed parameter one without values. `empty`: of its dtype, and of size 0."""
    kind = type(param)
    if issubclass(kind, _Empty):
        return
    param.data = empty
    param.__class__ = _CLASSES.get(kind) or _class_of(kind)
