"""Packages that only a config asks for."""

from __future__ import annotations

import importlib
from typing import Any

from zeroxide.errors import ConfigError

__all__ = ["optional"]


def optional(module: str, *, package: str, key: str) -> Any:
    """The `module`, for which `package` is needed. Raises ConfigError where it cannot be imported: the `key` that asked
    for it, and what to do."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{key} needs the package {package}: pip install {package} (importing it failed: {reason})",
            path=key,
            expected=f"the package {package}",
        ) from error
