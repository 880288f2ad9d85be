"""Tensor parallelism: each rank has a part of every matrix, and computes it for the same samples."""

from zeroxide.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from zeroxide.parallel.tensor.cut import SHARD, TensorShard, shard_of
from zeroxide.parallel.tensor.group import TensorGroup
from zeroxide.parallel.tensor.rules import find_rules
from zeroxide.parallel.tensor.shard import Sharding, shard_model
from zeroxide.parallel.tensor.spec import LayerRule, TPLayerSpec

__all__ = [
    "SHARD",
    "LayerRule",
    "Sharding",
    "TPLayerSpec",
    "TensorGroup",
    "TensorShard",
    "find_rules",
    "shard_model",
    "shard_of",
    "vocab_parallel_cross_entropy",
]
