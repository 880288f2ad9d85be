"""What Lightning's precisions mean for an engine, which casts itself: nothing runs under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor, _DtypeContextManager
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn

from zeroxide.integrations.lightning.settings import dtype_of
from zeroxide.params.handle import handle_of

__all__ = ["EnginePrecision"]


class EnginePrecision:
    """ "32-true", "bf16-mixed", "bf16-true", "16-mixed" or "16-true".

    In each the engine has exact weights beside those that it computes with. With "true" the model is cast before, so
    that its first weights are rounded. Raises ConfigError for other precisions.
    """

    def __init__(self, precision: Any) -> None:
        self.dtype = dtype_of(precision)
        self.precision = precision

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts the model for "true", unless it is fp32 or in slices, which have been cast as they were made."""
        if not self._casts() or any(handle_of(each) is not None for each in module.parameters()):
            return module
        return module.to(self.dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New tensors are of the dtype, with "true"."""
        return _DtypeContextManager(self.dtype) if self._casts() else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """So are new modules."""
        return self.tensor_init_context()

    def _casts(self) -> bool:
        return bool(self.precision.endswith("-true")) and self.dtype is not torch.float32

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors of a batch in the dtype; with "32-true", which a config may overrule, as they are."""
        if self.dtype is torch.float32:
            return data
        return apply_to_collection(data, function=_convert_fp_tensor, dtype=torch.Tensor, dst_type=self.dtype)
