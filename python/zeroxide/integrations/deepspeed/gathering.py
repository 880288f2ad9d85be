"""Contexts and wrappers of `deepspeed.runtime.zero` and `deepspeed.module_inject`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from zeroxide.errors import ModelError
from zeroxide.parallel.tensor import shard_of
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
    """Weights of layers that tensor parallelism has replaced, whole; those that it has not are where they are.

    Raises ModelError for a parameter of which this rank has a part: `engine.module_state_dict` puts them together.
    """

    def __init__(self, params: Iterable[nn.Parameter] | nn.Parameter, module: nn.Module, enabled: bool = True) -> None:
        asked = [params] if isinstance(params, nn.Parameter) else list(params)
        cut = next((each for each in asked if shard_of(each) is not None), None)
        if enabled and cut is not None:
            raise ModelError(
                f"GatherReplacedLayerParams: a parameter of shape {tuple(cut.shape)} is this rank's part of a matrix: "
                "call engine.module_state_dict() or zeroxide.safe_get_full_fp32_param on every rank for all of it"
            )
        super().__init__(asked, enabled=enabled)
        self.module = module
