"""Parameters of which an engine's ranks have a part: what all of it is, out of the parts and into them."""

from __future__ import annotations

import torch

from zeroxide.device.placement import HOST
from zeroxide.parallel.tensor import TensorGroup, shard_of
from zeroxide.precision.bits import bytes_of

__all__ = ["Whole"]


class Whole:
    """What has all of a parameter, where tensor-parallel ranks share it: `group`, every rank of which makes each call.

    Without a group the engine's ranks have all of everything.
    """

    def __init__(self, group: TensorGroup | None = None) -> None:
        self.group = group

    @property
    def leads(self) -> bool:
        """Whether this rank, if it is the first of its engine's, is the first of all."""
        return self.group is None or self.group.position == 0

    def shape(self, param: torch.Tensor, own: torch.Size) -> torch.Size:
        """The shape of all of a parameter whose part here has the shape `own`."""
        shard = None if self.group is None else shard_of(param)
        return own if shard is None else torch.Size(shard.shape)

    def of(self, param: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """All of what `own`, of any shape, is this rank's part of, in the parameter's full shape."""
        shard = None if self.group is None else shard_of(param)
        if self.group is None or shard is None:
            return own
        widest = max(part.numel for part in shard.parts())
        raw = torch.zeros(widest * own.itemsize, dtype=torch.uint8, device=HOST)
        raw[: own.nbytes] = bytes_of(own)
        full = torch.empty(shard.shape, dtype=own.dtype, device=HOST)
        rows = self.group.gather_rows(raw, "putting a parameter together")
        for part, row in zip(shard.parts(), rows, strict=True):
            part.put(full, row[: part.numel * own.itemsize].view(own.dtype).view(part.local_shape))
        return full

    def part(self, param: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """This rank's part, contiguous, of the first rank's `full`, contiguous and in the full shape; others give
        memory for it."""
        if self.group is None:
            return full
        self.group.broadcast(full, "taking a parameter apart")
        shard = shard_of(param)
        return full if shard is None else shard.take(full).contiguous()

    def repeat(self, param: torch.Tensor, values: torch.Tensor) -> None:
        """Makes the first rank's values, contiguous, those of all where all have all of the parameter."""
        if self.group is not None and shard_of(param) is None:
            self.group.broadcast(values, "repeating a parameter")
