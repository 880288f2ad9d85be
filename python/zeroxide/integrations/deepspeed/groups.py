"""Groups of ranks as DeepSpeed names them: those that share the data, and those that share sequences, if any do."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from zeroxide.errors import ModelError
from zeroxide.integrations.deepspeed.comm import get_rank, get_world_size
from zeroxide.parallel.sequence.parallel_state import (
    current_state,
    get_sequence_parallel_group,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
)

__all__ = ["get_data_parallel_group", "get_data_parallel_rank", "get_data_parallel_world_size"]


def get_data_parallel_group() -> Any:
    """The ranks that take other samples: all of them, where no ranks share sequences. Raises ModelError where there is
    no group."""
    if not dist.is_initialized():
        raise ModelError("no process group: call deepspeed.init_distributed first")
    state = current_state()
    return dist.group.WORLD if state is None else state.get_data_parallel_group()


def get_data_parallel_rank() -> int:
    """This rank's number among those that take other samples."""
    state = current_state()
    return get_rank() if state is None else state.get_data_parallel_rank()


def get_data_parallel_world_size() -> int:
    """How many ranks take other samples."""
    state = current_state()
    return get_world_size() if state is None else state.get_data_parallel_world_size()


_get_data_parallel_group = get_data_parallel_group
_get_data_parallel_rank = get_data_parallel_rank
_get_data_parallel_world_size = get_data_parallel_world_size
_get_sequence_parallel_group = get_sequence_parallel_group
_get_sequence_parallel_rank = get_sequence_parallel_rank
_get_sequence_parallel_world_size = get_sequence_parallel_world_size
