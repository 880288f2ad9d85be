"""Partitioned training state: units, where their bytes are, and the hooks that bring them where they are used.

What users take from here has DeepSpeed's names; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeroxide.params.handle import ZeroParamStatus
    from zeroxide.zero.access.gathered import GatheredParameters
    from zeroxide.zero.access.safe import (
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
    from zeroxide.zero.external import register_external_parameter, unregister_external_parameter
    from zeroxide.zero.init.context import Init
    from zeroxide.zero.leaf import (
        get_z3_leaf_modules,
        set_z3_leaf_module,
        set_z3_leaf_modules,
        set_z3_leaf_modules_by_name,
        set_z3_leaf_modules_by_suffix,
        unset_z3_leaf_modules,
        unset_z3_leaf_modules_by_name,
        unset_z3_leaf_modules_by_suffix,
        z3_leaf_module,
        z3_leaf_parameter,
    )

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "get_z3_leaf_modules",
    "register_external_parameter",
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
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unregister_external_parameter",
    "unset_z3_leaf_modules",
    "unset_z3_leaf_modules_by_name",
    "unset_z3_leaf_modules_by_suffix",
    "z3_leaf_module",
    "z3_leaf_parameter",
]

_OTHERS = {
    "GatheredParameters": "access.gathered",
    "Init": "init.context",
    "register_external_parameter": "external",
    "unregister_external_parameter": "external",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'zeroxide.zero' has no attribute {name!r}")
    if name == "ZeroParamStatus":
        from zeroxide.params.handle import ZeroParamStatus

        return ZeroParamStatus
    home = _OTHERS.get(name) or ("access.safe" if name.startswith("safe_") else "leaf")
    found = getattr(importlib.import_module(f"zeroxide.zero.{home}"), name)
    globals()[name] = found
    return found
