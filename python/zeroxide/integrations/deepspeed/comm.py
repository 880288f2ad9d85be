"""`deepspeed.comm`: torch's collectives where DeepSpeed names their arguments otherwise, and who this rank is.

Where no process group has been made, a rank is the only one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from zeroxide.distributed import all_gather_single

__all__ = [
    "all_gather_into_tensor",
    "all_to_all_single",
    "get_global_rank",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "reduce_scatter_tensor",
]


def get_rank(group: Any = None) -> int:
    """This rank's number in `group`, by default among all ranks."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    """How many ranks `group` has, by default all."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """This rank's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    """The number among all ranks of the one that has `group_rank` in `group`, by default the group of all."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def all_gather_into_tensor(
    output_tensor: torch.Tensor, tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """`tensor` of every rank, one after the other, in `output_tensor`. Returns a `Work` to wait for if `async_op`."""
    return all_gather_single(output_tensor, tensor, group=group, async_op=async_op)


def reduce_scatter_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """This rank's part of the sum of all ranks' `tensor` in `output_tensor`. Returns as `all_gather_into_tensor`."""
    # torch 2.13 gave reduce_scatter_tensor this name and warns about the old one.
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return call(output_tensor, tensor, op=op, group=group, async_op=async_op)


def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """A part of `tensor` to each rank, and theirs in `output`. Returns as `all_gather_into_tensor`."""
    return dist.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group, async_op)
