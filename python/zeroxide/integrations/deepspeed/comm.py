"""`deepspeed.comm`: torch's collectives, logged where `comms_logger` is on, and who this rank is.

Where DeepSpeed names arguments otherwise than torch, its names count. Where no process group has been made, a rank is
the only one.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from zeroxide.distributed import COMMS, all_gather_single
from zeroxide.distributed.comms_log import Began

__all__ = [
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "get_global_rank",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "irecv",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter_tensor",
    "scatter",
    "send",
]

_OF_SCRIPTS = "of scripts"
"""What sets a script's own collectives apart in the log from an engine's."""


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


# The log -------------------------------------------------------------------------------------------------------------


class _LoggedWork:
    """A `Work` whose collective is complete, to the log, once somebody has waited for it."""

    def __init__(self, work: Any, began: Began) -> None:
        self._work = work
        self._began: Began | None = began

    def wait(self, *arguments: Any, **keywords: Any) -> Any:
        """As the `Work`'s own."""
        result = self._work.wait(*arguments, **keywords)
        began, self._began = self._began, None
        COMMS.end(began)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _logged(op: str, call: Callable[..., Any], incoming: Callable[[dict[str, Any], int], int]) -> Callable[..., Any]:
    """`call`, which the log counts as `op`.

    incoming: from its arguments by name and the number of ranks, the bytes that come to this one.
    """
    names = [*inspect.signature(call).parameters]

    @functools.wraps(call)
    def logging(*given: Any, **named: Any) -> Any:
        if not COMMS.enabled:
            return call(*given, **named)
        arguments = dict(zip(names, given, strict=False)) | named
        ranks = get_world_size(arguments.get("group"))
        began = COMMS.begin(op, incoming(arguments, ranks), ranks, what=_OF_SCRIPTS)
        result = call(*given, **named)
        if began is None:
            return result
        if hasattr(result, "wait"):
            return _LoggedWork(result, began)
        COMMS.end(began)
        return result

    return logging


def _tensor(arguments: dict[str, Any], _ranks: int) -> int:
    return int(arguments["tensor"].nbytes)


def _of_all_others(arguments: dict[str, Any], ranks: int) -> int:
    return int(arguments["tensor"].nbytes) * (ranks - 1)


def _summed(arguments: dict[str, Any], ranks: int) -> int:
    # Every rank's parts, and then the sums of the others' parts.
    return 2 * int(arguments["tensor"].nbytes) * (ranks - 1) // ranks


def _parts(arguments: dict[str, Any], ranks: int) -> int:
    return int(arguments["output_tensor"].nbytes) * (ranks - 1)


def _exchanged(arguments: dict[str, Any], ranks: int) -> int:
    output, sizes = arguments["output"], arguments.get("output_split_sizes")
    if not sizes:
        return int(output.nbytes) * (ranks - 1) // ranks
    rank = max(0, get_rank(arguments.get("group")))
    row = int(output[0].nbytes) if output.shape[0] else 0
    return row * (int(sum(sizes)) - int(sizes[rank]))


all_gather = _logged("all_gather", dist.all_gather, _of_all_others)
all_gather_into_tensor = _logged("all_gather", all_gather_into_tensor, _of_all_others)
all_reduce = _logged("all_reduce", dist.all_reduce, _summed)
all_to_all_single = _logged("all_to_all", all_to_all_single, _exchanged)
barrier = _logged("barrier", dist.barrier, lambda _arguments, _ranks: 0)
broadcast = _logged("broadcast", dist.broadcast, _tensor)
gather = _logged("gather", dist.gather, _tensor)
irecv = _logged("recv", dist.irecv, _tensor)
isend = _logged("send", dist.isend, _tensor)
recv = _logged("recv", dist.recv, _tensor)
reduce = _logged("reduce", dist.reduce, _tensor)
reduce_scatter_tensor = _logged("reduce_scatter", reduce_scatter_tensor, _parts)
scatter = _logged("scatter", dist.scatter, _tensor)
send = _logged("send", dist.send, _tensor)
