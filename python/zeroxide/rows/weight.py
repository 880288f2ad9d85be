"""What stands in the place of a weight that is cut by rows: shape, dtype and device, and no values.

It has no memory. Three operations are computed a block of rows at a time, whoever calls them with it:
`functional.embedding`, `functional.linear` and `losses.linear_cross_entropy`. Whatever else needs its values is told
that they are never there at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from zeroxide.errors import ModelError
from zeroxide.losses import linear_cross_entropy
from zeroxide.params.absent import AbsentValues
from zeroxide.rows.block import RowBlocks
from zeroxide.rows.operations import cross_entropy, look_up, project

__all__ = ["CutWeight"]

_DESCRIBING = frozenset({
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex",
    "layout", "is_sparse", "is_quantized", "is_nested", "is_leaf", "grad", "grad_fn", "element_size", "itemsize",
    "nbytes", "__len__", "__hash__", "is_contiguous", "is_mkldnn", "is_inference", "_backward_hooks", "retains_grad",
    "names",
})  # fmt: skip
"""What is asked of a tensor without its values."""


_OF_BLOCKS = frozenset({"dtype", "device", "requires_grad", "is_meta"})
"""What the blocks say of themselves, and so of all."""


class CutWeight(torch.Tensor):
    """A matrix that is there in blocks of rows."""

    blocks: RowBlocks

    @classmethod
    def of(cls, blocks: RowBlocks) -> CutWeight:
        """Stands for the matrix of `blocks`."""
        with torch._C.DisableTorchFunctionSubclass():
            found = AbsentValues.of(blocks.name, blocks.shape, blocks.first.dtype).as_subclass(cls)
        found.blocks = blocks
        return found

    @property
    def _handle(self) -> NoReturn:
        """Whoever asks for the values of a parameter of an engine asks its handle. Raises ModelError."""
        raise _refusal(self, "access to a parameter")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        act = _ACTS.get(func)
        if act is not None and (found := act(*args, **kwargs)) is not NotImplemented:
            return found
        name = _name_of(func)
        weight = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, CutWeight))
        if name in _OF_BLOCKS:
            return getattr(weight.blocks.first, name)
        if name not in _DESCRIBING:
            raise _refusal(weight, name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CutWeight({self.blocks.name}, {tuple(self.shape)}, {len(self.blocks)} blocks of rows)"

    def __deepcopy__(self, memo: dict[int, Any]) -> CutWeight:
        if id(self) not in memo:
            memo[id(self)] = CutWeight.of(copy.deepcopy(self.blocks, memo))
        found: CutWeight = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return CutWeight.of, (self.blocks,)

    def tolist(self) -> NoReturn:
        """Raises ModelError."""
        raise _refusal(self, "tolist")


def _embedding(
    input: torch.Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, CutWeight) or isinstance(input, CutWeight):
        return NotImplemented
    if max_norm is not None:
        raise _refusal(weight, "embedding with max_norm")
    return look_up(weight.blocks, input, padding_idx, scale_grad_by_freq, sparse)


def _linear(input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> Any:
    if not isinstance(weight, CutWeight) or isinstance(input, CutWeight) or isinstance(bias, CutWeight):
        return NotImplemented
    return project(weight.blocks, input, bias)


def _linear_cross_entropy(input: torch.Tensor, linear_weight: Any, target: torch.Tensor, **own: Any) -> Any:
    if not isinstance(linear_weight, CutWeight) or isinstance(input, CutWeight):
        return NotImplemented
    return cross_entropy(linear_weight.blocks, input, target, **own)


_ACTS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.embedding: _embedding,
    functional.linear: _linear,
    linear_cross_entropy: _linear_cross_entropy,
}


def _name_of(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", str(func))
    # What a property is looked up by.
    return getattr(func.__self__, "__name__", name) if name == "__get__" and hasattr(func, "__self__") else name


def _refusal(weight: CutWeight, what: str) -> ModelError:
    name = weight.blocks.name
    return ModelError(
        f"{name} {tuple(weight.blocks.shape)} is cut by rows (zeroxide.row_bytes), and {what} needs all of it at once: "
        "embeddings, linear layers and linear_cross_entropy take it a block at a time, engine.module_state_dict() has "
        "its values, and without zeroxide.row_bytes it stays in one piece",
        name=name,
    )
