"""What scripts do to nested containers of tensors, and to loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from zeroxide.device.placement import HOST, address

__all__ = ["RepeatingLoader", "clone_tensors_for_torch_save", "move_to_device"]


def _mapped(item: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(item, torch.Tensor):
        return change(item)
    if isinstance(item, list | tuple):
        members = [_mapped(each, change) for each in item]
        return type(item)(*members) if hasattr(item, "_fields") else type(item)(members)
    if isinstance(item, dict):
        return type(item)((key, _mapped(each, change)) for key, each in item.items())
    return item


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = HOST) -> Any:
    """The same containers with copies of all tensors on `device`, so that `torch.save` writes nothing beyond them.

    Tensors that are views of one storage would each be written with all of it. Tensors that are one, as tied weights
    are, stay one.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        key = (address(tensor), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor),)
        if key not in copies:
            copies[key] = tensor.detach().clone().to(device)
        return copies[key]

    return _mapped(item, copied)


def move_to_device(
    item: Any, device: torch.device | str, criterion_func: Callable[[torch.Tensor], bool] | None = None
) -> Any:
    """The same containers with the tensors for which `criterion_func` is true, by default all, on `device`."""
    return _mapped(
        item, lambda tensor: tensor.to(device) if criterion_func is None or criterion_func(tensor) else tensor
    )


class RepeatingLoader:
    """A loader that begins again when it ends."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)
