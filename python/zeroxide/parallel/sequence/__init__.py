"""Sequences that several ranks share, and what computes a part of a sequence at a time."""

from zeroxide.parallel.sequence.batches import UlyssesSPDataLoaderAdapter, shard_batch
from zeroxide.parallel.sequence.distributed_attention import DistributedAttention
from zeroxide.parallel.sequence.huggingface import UlyssesSPAttentionHF
from zeroxide.parallel.sequence.loss import average_over_tokens
from zeroxide.parallel.sequence.parallel_state import (
    SequenceParallelState,
    destroy_sequence_parallel,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_sequence_data_parallel_group,
    get_sequence_data_parallel_rank,
    get_sequence_data_parallel_world_size,
    get_sequence_parallel_group,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    initialize_sequence_parallel,
    sequence_parallel_is_initialized,
)
from zeroxide.parallel.sequence.registration import Registration
from zeroxide.parallel.sequence.ring import ring_attention
from zeroxide.parallel.sequence.tiled import (
    SequenceTiledCompute,
    TiledFusedLogitsLoss,
    TiledMLP,
    sequence_tiled_compute,
)

__all__ = [
    "DistributedAttention",
    "Registration",
    "SequenceParallelState",
    "SequenceTiledCompute",
    "TiledFusedLogitsLoss",
    "TiledMLP",
    "UlyssesSPAttentionHF",
    "UlyssesSPDataLoaderAdapter",
    "average_over_tokens",
    "destroy_sequence_parallel",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_sequence_data_parallel_group",
    "get_sequence_data_parallel_rank",
    "get_sequence_data_parallel_world_size",
    "get_sequence_parallel_group",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "initialize_sequence_parallel",
    "ring_attention",
    "sequence_parallel_is_initialized",
    "sequence_tiled_compute",
    "shard_batch",
]
