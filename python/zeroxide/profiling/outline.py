"""Tensors that have a shape and a dtype, and no values: what a model's pass takes is found with them.

Code of models asks of a tensor on the meta device what it cannot answer (`.item()` of a position), and takes other
operations for it than on the host. An `Outline` says that it is on the host, and its memory is one of the meta device:
views share it, and it ends when the last of them does. Integers and truth values have values, so that what code asks of
them has an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from zeroxide.device.placement import HOST

__all__ = ["Outline", "become_outline"]

_META = torch.device("meta")


class Outline(torch.Tensor):
    """A tensor on the host without values. An operation on it is one on its `form`, a tensor on the meta device."""

    form: torch.Tensor

    @staticmethod
    def __new__(cls, form: torch.Tensor) -> Outline:
        """The outline of a tensor on the meta device."""
        made: Outline = torch.Tensor._make_wrapper_subclass(
            cls,
            form.shape,
            strides=form.stride(),
            storage_offset=form.storage_offset(),
            dtype=form.dtype,
            layout=form.layout,
            device=HOST,
            requires_grad=False,
        )
        made.form = form
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Outline({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        form_args, form_kwargs = tree_map_only(torch.Tensor, _form, (args, kwargs))
        if form_kwargs.get("device") is not None:
            form_kwargs["device"] = _META
        result = tree_map_only(torch.Tensor, Outline, func(*form_args, **form_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, result)  # type: ignore[no-untyped-call]


def _form(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.form if isinstance(tensor, Outline) else tensor.to(_META)


def become_outline(module: nn.Module) -> None:
    """Makes every parameter and buffer of `module`, whose parameters are on the meta device, an outline.

    Tied parameters stay tied, and what is one stays what it is. Buffers of integers and truth values on the meta device
    become zeros.
    """
    made: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, param in each._parameters.items():
            if param is not None:
                if isinstance(param, Outline):
                    made[id(param)] = param
                elif id(param) not in made:
                    made[id(param)] = nn.Parameter(Outline(param.detach().to(_META)), requires_grad=param.requires_grad)
                each._parameters[name] = made[id(param)]
        for name, buffer in each._buffers.items():
            if buffer is None or isinstance(buffer, Outline):
                continue
            if buffer.is_floating_point() or buffer.is_complex():
                each._buffers[name] = Outline(buffer.to(_META))
            elif buffer.is_meta:
                each._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=HOST)
