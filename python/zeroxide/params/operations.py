"""What an operation asks of the parameters that it is given: nothing, their shape, their values, or to change them."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

from torch import nn

__all__ = ["Need", "name_of", "need_of", "parameters_in"]


class Need(Enum):
    """What an operation needs of a parameter."""

    NOTHING = auto()
    """Something that an empty parameter knows as well."""
    SHAPE = auto()
    """How large it is."""
    ADDRESS = auto()
    """Where its values are."""
    VALUES = auto()
    """Its values, to compute with."""
    CHANGE = auto()
    """Its memory, to write to it."""


_NOTHING = {
    *("requires_grad", "grad", "dtype", "device", "is_leaf", "layout", "is_meta", "grad_fn", "is_sparse", "names"),
    *("requires_grad_", "is_floating_point", "is_complex", "__hash__", "__repr__", "_backward_hooks", "retains_grad"),
    *(
        "register_hook",
        "register_post_accumulate_grad_hook",
        "is_cuda",
        "is_cpu",
        "_version",
        "element_size",
        "itemsize",
    ),
    *("_post_accumulate_grad_hooks", "retain_grad", "output_nr", "name", "get_device", "is_signed", "is_inference"),
    *("is_quantized", "is_mkldnn", "is_nested", "is_sparse_csr", "is_xpu", "is_mps", "is_conj", "is_neg", "_is_view"),
    *(
        "_base",
        "_grad",
        "_grad_fn",
        "_has_compatible_shallow_copy_type",
        "is_xla",
        "is_vulkan",
        "is_ipu",
        "is_hpu",
        "is_mtia",
        "is_maia",
        "is_ort",
    ),
}
"""Operations and attributes that look at no value and no size."""
_ADDRESS = {"data_ptr", "untyped_storage", "storage", "_typed_storage", "is_set_to", "share_memory_"}
_SHAPE = {
    *("shape", "size", "numel", "nelement", "dim", "ndimension", "ndim", "__len__", "stride", "storage_offset"),
    *("nbytes", "is_contiguous", "is_same_size", "is_pinned", "is_shared", "__str__", "__format__", "__dir__"),
}
_LIKE = {"view_as", "reshape_as", "expand_as"}
"""Operations that look at the shape of their second argument."""
_CHANGES = {"__setitem__", "__delitem__", "set_data"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
}


def name_of(func: Any) -> str:
    """The name of an operation, or of the attribute that is read or set."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name in ("__get__", "__set__") else name


def need_of(func: Any, first: bool) -> Need:
    """What `func` needs of a parameter; `first`: of its first argument, the one that operations in place change."""
    name = name_of(func)
    if name in _NOTHING:
        return Need.NOTHING
    if name in _SHAPE or (name in _LIKE and not first):
        return Need.SHAPE
    if name in _ADDRESS:
        return Need.ADDRESS
    in_place = name.endswith("_") and not name.endswith("__")
    return Need.CHANGE if first and (in_place or name in _CHANGES) else Need.VALUES


def parameters_in(tree: Any) -> Iterator[nn.Parameter]:
    """Every parameter among arguments, in nested tuples, lists and dicts."""
    if isinstance(tree, nn.Parameter):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from parameters_in(each)
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from parameters_in(each)
