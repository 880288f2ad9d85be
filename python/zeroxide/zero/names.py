"""Names of parameters and buffers as the model has them that nothing has wrapped and nothing has cut."""

from __future__ import annotations

from zeroxide.rows import BLOCKS

__all__ = ["own_name", "plain_name"]

COMPILED = "_orig_mod"
"""The attribute under which torch.compile keeps the module that it was given."""


def own_name(name: str) -> str:
    """A dotted name without what torch.compile puts into it, at any depth: what is saved loads with it and without."""
    if COMPILED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != COMPILED)


def plain_name(name: str) -> str:
    """The same, where a block of rows has the name of the matrix that it is of."""
    if BLOCKS not in name:
        return own_name(name)
    parts = own_name(name).split(".")
    # What stands behind the name of all blocks is a block's number.
    return ".".join(part for at, part in enumerate(parts) if BLOCKS not in (part, parts[at - 1] if at else ""))
