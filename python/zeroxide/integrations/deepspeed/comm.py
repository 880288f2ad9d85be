"""Who this rank is, also where no process group has been made: then it is the only one."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

__all__ = ["get_global_rank", "get_local_rank", "get_rank", "get_world_size"]


def get_rank(group: Any = None) -> int:
    """This rank's number in `group`, by default among all ranks."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    """How many ranks `group` has, by default all."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """This rank's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_global_rank(group: Any, group_rank: int) -> int:
    """The number among all ranks of the one that has `group_rank` in `group`."""
    return dist.get_global_rank(group, group_rank)
