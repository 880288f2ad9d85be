"""What forward computes in: the dtypes of the config as torch has them, autocast, and the cast of inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from zeroxide.config import Config, Dtype

__all__ = ["cast_buffers", "cast_inputs", "forward_context", "torch_dtype"]

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch dtype that the config calls `name`."""
    return _DTYPES[name]


def forward_context(config: Config) -> AbstractContextManager[Any]:
    """What forward runs under: torch.autocast where the config asks for it, inside any that the caller opened.

    Weights are not cached in the low dtype: such copies would stay until the end of forward, also of units that were
    released long before, and casting a weight again gives the same bits.
    """
    if config.autocast is None:
        return nullcontext()
    return torch.autocast("cpu", torch_dtype(config.autocast), cache_enabled=False)


def cast_inputs(config: Config, tree: Any) -> Any:
    """The arguments of forward, floating-point tensors in them cast to the dtype of the weights if asked for."""
    if not config.cast_inputs:
        return tree
    dtype = torch_dtype(config.precision)

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)


def cast_buffers(module: nn.Module, config: Config) -> None:
    """Casts the model's floating-point buffers to the dtype that the config has for them."""
    dtype = torch_dtype(config.buffer_dtype)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[name] = buffer.to(dtype)
