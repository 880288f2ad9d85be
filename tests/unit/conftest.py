"""Fixtures that several files of this folder share."""

from checkpointing import make
from several_ranks import sharded

__all__ = ["make", "sharded"]
