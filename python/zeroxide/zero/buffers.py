"""Buffers of a model: which an engine can look after, rank 0's for all ranks, and new values for one.

Buffers keep dtype and bits, whatever they are. They are copied as bytes.
"""

from __future__ import annotations

import torch
from torch import nn

from zeroxide.device.placement import address, has_values, in_host
from zeroxide.distributed import Ranks
from zeroxide.errors import ModelError
from zeroxide.precision.bits import bytes_of, same_width, tensor_of, why_not_bytes

__all__ = ["check_buffers", "move_buffers", "set_buffer", "share_buffers"]


def check_buffers(module: nn.Module, ranks: Ranks, *, made: bool) -> None:
    """Raises ModelError for buffers that cannot be given to all ranks, and for those on the meta device unless they are
    `made` with the weights."""
    for name, buffer in module.named_buffers():
        problem = why_not_bytes(buffer)
        if problem is not None and ranks.world > 1:
            raise ModelError(
                f"buffer {name} {problem}: it cannot be given to all ranks; keep it as a plain attribute of its module",
                name=name,
            )
        if not has_values(buffer) and not made:
            raise ModelError(
                f"buffer {name} is on the meta device and has no values: build it in host memory, or the whole model "
                "on the meta device with weights=, a WeightSource",
                name=name,
            )


def share_buffers(module: nn.Module, ranks: Ranks) -> None:
    """Makes rank 0's buffers those of every rank. Every rank calls it."""
    if ranks.world == 1:
        return
    for buffer in list(module.buffers()):
        raw = ranks.broadcast_tensor(in_host(bytes_of(buffer)))
        if address(raw) != address(buffer) and ranks.rank:
            set_buffer(module, buffer, tensor_of(raw, buffer.dtype, buffer.shape).to(buffer.device))


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Puts every buffer of `module` on `device`; a buffer of several modules stays one."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and has_values(buffer) and buffer.device != device:
                _, moved = made.setdefault(id(buffer), (buffer, buffer.to(device)))
                owner._buffers[name] = moved


def set_buffer(module: nn.Module, buffer: torch.Tensor, values: torch.Tensor) -> None:
    """Gives a buffer of `module` the values of a contiguous tensor of its dtype and shape.

    It stays the object that it is, but for one whose elements are not all its own, such as an expanded one: `values`
    takes its place in every module.
    """
    if buffer.is_conj() or buffer.is_neg() or _overlaps(buffer):
        for owner in module.modules():
            for name, each in owner._buffers.items():
                if each is buffer:
                    owner._buffers[name] = values
        return
    with torch.no_grad():
        same_width(buffer.detach()).copy_(same_width(values))


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements may lie at one address; also True for a few odd orders in which they do not."""
    reach = 1
    sizes = ((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    for stride, size in sorted(sizes):
        if stride < reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False
