"""Where weights and state lie while nothing uses them."""

from __future__ import annotations

from enum import Enum

__all__ = ["Home"]


class Home(Enum):
    """Where bytes live between uses."""

    HOST = "host"
    """Host memory."""
    SHARD = "shard"
    """This rank's shard in host memory; the whole only while in use."""
    DISK = "disk"
    """A file; in memory only while in use."""
    CONSUMED = "consumed"
    """Nowhere: gradients that backward has used up before the next ones come."""
