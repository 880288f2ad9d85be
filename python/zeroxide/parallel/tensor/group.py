"""The tensor-parallel group, and how activations cross into and out of what it computes together.

Parameters are plain tensors, each rank's own part, so that they live in an engine's units as any others do: a DTensor
is a subclass whose storage an engine cannot move under a window. So the ways across are autograd functions around
torch's own collectives. `torch.distributed.nn.functional.all_reduce` is none of them: its backward sums the gradients
of the ranks, as if each had a loss of its own, while here all have one loss (Megatron-LM, arXiv 1909.08053, section 3,
calls the two directions f and g).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from zeroxide.distributed import Ranks, all_gather_single
from zeroxide.distributed.collectives import first_line
from zeroxide.distributed.comms_log import COMMS
from zeroxide.errors import RanksError
from zeroxide.parallel.tensor.cut import TensorShard

__all__ = ["TensorGroup"]

_OVER = "over tensor ranks"
"""What sets these collectives apart in the log."""

Waiting = Callable[[str], AbstractContextManager[Any]]


class TensorGroup:
    """The ranks that each compute a part of every matrix, over the same samples.

    waiting: what a collective is done in, told what it is; an engine's watch, to which a lost rank is known.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.waiting: Waiting = lambda what: nullcontext()
        self.sent = 0
        """Bytes of activations and their gradients that have left this rank, as ring algorithms send them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorGroup:
        # Copies of a model that is cut compute together with the same ranks.
        return self

    @property
    def size(self) -> int:
        """How many they are."""
        return self.ranks.world

    @property
    def position(self) -> int:
        """This rank among them."""
        return self.ranks.rank

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which all ranks have alike; what each computes with it adds to its gradient."""
        found: torch.Tensor = _Copy.apply(tensor, self)
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor: the same bits on all."""
        found: torch.Tensor = _Sum.apply(tensor, self)
        return found

    def gather(self, tensor: torch.Tensor, shard: TensorShard) -> torch.Tensor:
        """The last dimension put together from every rank's part of it, which `shard` says."""
        found: torch.Tensor = _Gather.apply(tensor, self, shard)
        return found

    def split(self, tensor: torch.Tensor, shard: TensorShard) -> torch.Tensor:
        """This rank's part, which `shard` says, of the last dimension of what all ranks have alike."""
        last = TensorShard(tuple(tensor.shape), tensor.dim() - 1, shard.ranges, shard.position)
        return last.take(self.copy(tensor))

    # Without gradients ------------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, what: str, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Overwrites the tensor, contiguous, with the sum of every rank's; returns it."""
        if self.size == 1:
            return tensor
        # A ring sends each of `size` pieces on twice, but for one.
        size = 2 * (self.size - 1) * tensor.nbytes // self.size
        self.sent += size
        logged = COMMS.begin("all_reduce", size, self.size, what=_OVER) if COMMS.enabled else None
        with self.waiting(what):
            self._try(what, lambda: dist.all_reduce(tensor, op, group=self.ranks.group))
        COMMS.end(logged)
        return tensor

    def all_gather(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """[size, *shape]: every rank's tensor, of one shape."""
        given = tensor.contiguous()
        rows = torch.empty((self.size, *given.shape), dtype=given.dtype, device=given.device)
        if self.size == 1:
            return rows.copy_(given.unsqueeze(0))
        size = (self.size - 1) * given.nbytes
        self.sent += size
        logged = COMMS.begin("all_gather", size, self.size, what=_OVER) if COMMS.enabled else None
        with self.waiting(what):
            self._try(what, lambda: all_gather_single(rows.view(-1), given.view(-1), group=self.ranks.group))
        COMMS.end(logged)
        return rows

    def broadcast(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Overwrites the tensor, contiguous and in host memory, with the first rank's; returns it."""
        with self.waiting(what):
            return self.ranks.broadcast_tensor(tensor)

    def gather_rows(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """[size, numel]: every rank's tensor in host memory, of one numel and dtype."""
        with self.waiting(what):
            return self.ranks.gather_rows(tensor, what)

    def gather_objects(self, value: Any, what: str) -> list[Any]:
        """What every rank gave, anything that JSON can hold."""
        with self.waiting(what):
            return self.ranks.gather_objects(value)

    def _try(self, what: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except RuntimeError as error:
            found = self.ranks.explain() if self.ranks.explain is not None else None
            raise found or RanksError(
                f"tensor rank {self.position} of {self.size}: {what} failed: {first_line(error)}; another rank has "
                "probably ended: look at what each of them printed last"
            ) from error


class _Copy(torch.autograd.Function):
    """Identity; backward sums."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        return ctx.group.all_reduce(total, "the sum of gradients over tensor ranks"), None


class _Sum(torch.autograd.Function):
    """Sums; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        return group.all_reduce(total, "a sum over tensor ranks")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Puts the last dimension together; backward takes this rank's part of the gradient, which all have alike."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: TensorGroup, shard: TensorShard) -> torch.Tensor:
        ctx.shard = last = TensorShard(
            (*tensor.shape[:-1], shard.shape[shard.dim]), tensor.dim() - 1, shard.ranges, shard.position
        )
        widest = max(part.length for part in last.parts())
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1]))
        rows = group.all_gather(padded, "a gather over tensor ranks")
        full = tensor.new_empty(last.shape)
        for part, row in zip(last.parts(), rows, strict=True):
            part.put(full, row.narrow(-1, 0, part.length))
        return full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.shard.take(grad).contiguous(), None, None
