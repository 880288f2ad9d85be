"""zeroxide: train PyTorch models whose state does not fit, from host memory and NVMe, under a byte budget.

Names are imported when they are first used, so that importing the package costs next to nothing beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeroxide import errors, optim, zero
    from zeroxide.config.arguments import add_config_arguments
    from zeroxide.distributed import init_distributed
    from zeroxide.engine.engine import Engine
    from zeroxide.engine.entry import initialize
    from zeroxide.engine.tp_model_init import tp_model_init
    from zeroxide.errors import ZeroxideError
    from zeroxide.optim import AdamW
    from zeroxide.zero import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
    )

__all__ = [
    "AdamW",
    "Engine",
    "ZeroxideError",
    "__version__",
    "add_config_arguments",
    "errors",
    "init_distributed",
    "initialize",
    "optim",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "tp_model_init",
    "zero",
]

_HOMES = {
    "AdamW": "zeroxide.optim",
    "Engine": "zeroxide.engine.engine",
    "add_config_arguments": "zeroxide.config.arguments",
    "ZeroxideError": "zeroxide.errors",
    "init_distributed": "zeroxide.distributed",
    "initialize": "zeroxide.engine.entry",
    "tp_model_init": "zeroxide.engine.tp_model_init",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from zeroxide._core import __version__

        return __version__
    if name in ("errors", "optim", "zero"):
        return importlib.import_module(f"zeroxide.{name}")
    if name.startswith("safe_") and name in __all__:
        return getattr(importlib.import_module("zeroxide.zero"), name)
    if name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'zeroxide' has no attribute {name!r}")
