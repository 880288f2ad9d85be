"""Fixtures that several files of this folder share."""

from checkpointing import make

__all__ = ["make"]
