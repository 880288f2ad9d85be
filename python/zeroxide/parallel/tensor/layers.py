"""Layers of which each tensor-parallel rank has a part; `make_parallel` changes a module's class to one.

They are subclasses of what they were, so that `isinstance` says what it said, and their parameters keep their names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zeroxide.errors import ModelError
from zeroxide.parallel.tensor.cut import TensorShard
from zeroxide.parallel.tensor.group import TensorGroup
from zeroxide.parallel.tensor.region import Region

__all__ = ["ColumnEmbedding", "ColumnLinear", "RowLinear", "VocabParallelEmbedding", "is_conv1d", "make_parallel"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's linear layer whose weight is [inputs, outputs], as GPT-2 has it."""
    return any(
        each.__name__ == "Conv1D" and each.__module__ == "transformers.pytorch_utils" for each in type(module).__mro__
    )


class _Parallel(nn.Module):
    """What such a layer knows beside what it was."""

    tensor_group: TensorGroup
    weight_shard: TensorShard
    region: Region | None


class ColumnLinear(_Parallel):
    """y = x W + b, of which a rank has some columns; all are given all of them where `gathers`."""

    gathers: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs], the same on all ranks -> [..., this rank's outputs], or all outputs."""
        given = self.tensor_group.copy(x) if self.region is None else self.region.enter(x)
        found: torch.Tensor = super().forward(given)
        return self.tensor_group.gather(found, self.weight_shard) if self.gathers else found


class RowLinear(_Parallel):
    """y = x W + b, of which a rank has the rows of some inputs; partial products are summed before the bias."""

    splits: bool
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., this rank's inputs], or all inputs where it `splits` -> [..., outputs], the same on all ranks."""
        if self.region is not None:
            self.region.leave()
        if self.splits:
            x = self.tensor_group.split(x, self.weight_shard)
        if self.weight_shard.dim == 0:
            partial = torch.mm(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        else:
            partial = functional.linear(x, self.weight)
        total = self.tensor_group.sum(partial)
        return total if self.bias is None else total + self.bias


class ColumnEmbedding(_Parallel):
    """An embedding of which a rank has some features."""

    gathers: bool

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., this rank's features], or all features."""
        found: torch.Tensor = super().forward(ids)
        return self.tensor_group.gather(found, self.weight_shard) if self.gathers else found


class VocabParallelEmbedding(_Parallel):
    """An embedding of which a rank has some rows; what it has no row for is zero, and the sum is the exact lookup."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., features], the same on all ranks."""
        ((first, count),) = self.weight_shard.own
        absent = (ids < first) | (ids >= first + count)
        found: torch.Tensor = super().forward((ids - first).masked_fill(absent, 0))
        return self.tensor_group.sum(found.masked_fill(absent.unsqueeze(-1), 0))


_made: dict[tuple[type, type], type] = {}


def make_parallel(
    module: Any, kind: type[_Parallel], shard: TensorShard, group: TensorGroup, region: Region | None, **own: Any
) -> None:
    """Makes the module one of `kind`, whose weight is `shard` of what it was.

    Raises ModelError for one whose forward is not that of its kind of layer.
    """
    known = type(module)
    if kind is RowLinear and not is_conv1d(module) and known.forward is not nn.Linear.forward:
        raise ModelError(
            f"a {known.__name__} has a forward of its own, which adds the bias on every tensor rank: cut nn.Linear "
            "layers by row, or replace it"
        )
    key = kind, known
    if key not in _made:
        _made[key] = type(f"{kind.__name__}Of{known.__name__}", (kind, known), {"__module__": known.__module__})
    module.__class__ = _made[key]
    module.tensor_group, module.weight_shard, module.region = group, shard, region
    for name, value in own.items():
        setattr(module, name, value)
