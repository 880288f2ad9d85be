"""Groups of ranks as DeepSpeed names them: all ranks share the data, and each has whole sequences."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from zeroxide.errors import ModelError
from zeroxide.integrations.deepspeed.comm import get_rank, get_world_size

__all__ = ["get_data_parallel_group", "get_data_parallel_rank", "get_data_parallel_world_size"]


def get_data_parallel_group() -> Any:
    """The group of all ranks. Raises ModelError where there is none."""
    if not dist.is_initialized():
        raise ModelError("no process group: call deepspeed.init_distributed first")
    return dist.group.WORLD


def get_data_parallel_rank() -> int:
    """This rank's number among those that share the data."""
    return get_rank()


def get_data_parallel_world_size() -> int:
    """How many ranks share the data."""
    return get_world_size()


def _get_sequence_parallel_group() -> Any:
    raise ModelError(
        "sequence parallelism is not built in zeroxide yet: there is no group of ranks that share sequences"
    )


def _get_sequence_parallel_rank() -> int:
    return 0


def _get_sequence_parallel_world_size() -> int:
    return 1


_get_data_parallel_group = get_data_parallel_group
_get_data_parallel_rank = get_data_parallel_rank
_get_data_parallel_world_size = get_data_parallel_world_size
