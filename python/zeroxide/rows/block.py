"""Blocks of rows of one matrix: modules, each with its rows as a parameter, so that whatever gathers modules' weights
gathers a block alone.

A module whose weight is cut has its blocks in a `RowBlocks` under the name `BLOCKS`; modules that share a weight share
that. State dicts have the matrix under the name and in the shape that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn

from zeroxide.errors import ModelError
from zeroxide.params.absent import AbsentValues

__all__ = ["BLOCKS", "WEIGHT", "RowBlock", "RowBlocks", "RowRange", "blocks_of", "in_blocks", "rows_of"]

BLOCKS = "_weight_rows"
"""The name of a module's blocks among its modules."""
WEIGHT = "weight"
"""The name of what is cut."""

_ROWS = "_row_range"


@dataclass(frozen=True)
class RowRange:
    """Which rows of a matrix of `shape` a parameter is: those from `first` on, to before `end`."""

    shape: tuple[int, ...]
    first: int
    end: int

    @property
    def start(self) -> int:
        """The first of its elements among those of the matrix."""
        return self.first * (self.shape[1])


def rows_of(param: torch.Tensor) -> RowRange | None:
    """Which rows of a matrix the parameter is; None for one that is no block of rows."""
    found = getattr(param, _ROWS, None)
    return found if isinstance(found, RowRange) else None


class RowBlock(nn.Module):
    """Some rows of a matrix."""

    def __init__(self, weight: nn.Parameter, rows: RowRange) -> None:
        super().__init__()
        setattr(weight, _ROWS, rows)
        self.weight = weight
        self.rows = rows

    def forward(self, act: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """`act(weight, *args)`, where weight has the block's rows."""
        return act(self.weight, *args)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.rows.first} to {self.rows.end - 1} of {self.rows.shape[0]}"


class RowBlocks(nn.ModuleList):
    """All blocks of the matrix `name`, in order."""

    every = False
    """Whether all blocks are used in every pass, also those that have nothing to do: what is gathered by several ranks
    together must not depend on what one of them computes."""

    def __init__(self, name: str, shape: Sequence[int], blocks: Sequence[RowBlock]) -> None:
        super().__init__(blocks)
        self.name = name
        self.shape = torch.Size(shape)
        self._given: Any = None

    def __iter__(self) -> Iterator[RowBlock]:
        return super().__iter__()  # type: ignore[return-value]

    @property
    def first(self) -> nn.Parameter:
        """Rows that stand for all where a dtype or device is asked for."""
        # Not as somebody who is about to use them.
        found: nn.Parameter = dict.__getitem__(self._modules["0"]._parameters, WEIGHT)  # type: ignore[assignment]
        return found

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The matrix under its own name: a copy, put together of the values of all blocks."""
        if _raw or destination is None:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if keep_vars:
            raise ModelError(
                f"state_dict(keep_vars=True): {self.name} was asked for itself, and it is cut by rows "
                "(zeroxide.row_bytes): leave keep_vars out",
                name=self.name,
            )
        name = prefix.removesuffix(f"{BLOCKS}.") + WEIGHT
        known = None if self._given is None else self._given()
        if known is None or all(known is not other for other in destination.values()):
            known = self._together()
            self._given = ref(known)
        destination[name] = known
        return destination

    def _together(self) -> torch.Tensor:
        found: torch.Tensor | None = None
        for block in self:
            values = block.state_dict()[WEIGHT]
            if isinstance(values, AbsentValues):
                return AbsentValues.of(self.name, self.shape, values.dtype)
            if found is None:
                found = torch.empty(self.shape, dtype=values.dtype, device=values.device)
            found[block.rows.first : block.rows.end] = values
        assert found is not None, "there are blocks"
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_given": None}  # type: ignore[no-untyped-call]


_raw = False


@contextmanager
def in_blocks() -> Iterator[None]:
    """State dicts meanwhile have blocks as they are, under names of their own."""
    global _raw
    before, _raw = _raw, True
    try:
        yield
    finally:
        _raw = before


def blocks_of(module: nn.Module) -> RowBlocks | None:
    """The blocks of the module's weight; None where it is not cut."""
    found = module._modules.get(BLOCKS)
    return found if isinstance(found, RowBlocks) else None
