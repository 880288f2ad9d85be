"""Names of parameters and buffers as the model has them that nothing has wrapped."""

from __future__ import annotations

__all__ = ["plain_name"]

COMPILED = "_orig_mod"
"""The attribute under which torch.compile keeps the module that it was given."""


def plain_name(name: str) -> str:
    """A dotted name without what torch.compile puts into it, at any depth: what is saved loads with it and without."""
    if COMPILED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != COMPILED)
