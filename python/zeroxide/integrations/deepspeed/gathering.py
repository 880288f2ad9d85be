"""Contexts and wrappers of `deepspeed.runtime.zero` and `deepspeed.module_inject`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from zeroxide.zero import GatheredParameters

__all__ = ["GatherReplacedLayerParams", "zero_wrapper_for_fp_tensor_constructor"]


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., Any], target_fp_dtype: torch.dtype, target_device: torch.device
) -> Callable[..., Any]:
    """`fn` itself: `zero.Init` changes no constructor of torch's, so there is nothing to wrap.

    transformers replaces this function while it builds a model, to keep `arange` from being wrapped.
    """
    return fn


class GatherReplacedLayerParams(GatheredParameters):
    """Weights of layers that tensor parallelism has replaced, whole. It replaces none here, so that whoever asks gets
    them from where they are."""

    def __init__(self, params: Iterable[nn.Parameter] | nn.Parameter, module: nn.Module, enabled: bool = True) -> None:
        super().__init__(params, enabled=enabled)
        self.module = module
