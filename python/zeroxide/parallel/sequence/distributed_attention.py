"""Any attention over sequences that ranks share: `DistributedAttention`, with DeepSpeed's signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zeroxide.errors import ModelError, TensorError
from zeroxide.parallel.sequence.exchange import Exchange, Heads, gather_numbers, to_heads, to_sequence

__all__ = ["DistributedAttention"]

_NAMES = ("query", "key", "value")


class DistributedAttention(nn.Module):
    """Attention of which each rank of a group has a part of the tokens before and after, and a part of the heads
    between.

    local_attention: called as `local_attention(query, key, value, *args, **kwargs)` with all tokens and this rank's
        heads, in the layout of what was given. It returns the same layout, or heads and their size as one dimension.
    sequence_process_group: the ranks that share sequences, in the order of their parts.
    scatter_idx: the dimension of the heads. gather_idx: that of the tokens, 0 or 1.
    sp_stream: refused unless None: the exchange runs in the order of the operations around it.
    num_kv_heads: of the key, where they are fewer than the query's; it must be what the key has.

    Heads and tokens need not divide by the ranks. Where a rank's query heads do not attend to its key heads in groups
    of one size, key and value are given to `local_attention` once for each query head.
    """

    def __init__(
        self,
        local_attention: Callable[..., torch.Tensor],
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if sp_stream is not None:
            raise ModelError("DistributedAttention: sp_stream is not built: leave it None")
        if scatter_idx != 2 or gather_idx not in (0, 1):
            raise ModelError(
                f"DistributedAttention: scatter_idx {scatter_idx}, gather_idx {gather_idx}: expected heads in "
                "dimension 2 and tokens in dimension 0 or 1"
            )
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx, self.gather_idx = scatter_idx, gather_idx
        self.num_kv_heads = num_kv_heads

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch_dim_idx: int | None = None,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The output for this rank's tokens, of the query's shape.

        query, key, value: [tokens, batch, heads, size] with gather_idx 0, or [batch, tokens, heads, size] with 1; key
        and value of one shape. batch_dim_idx: the dimension of the batch, which follows from gather_idx.

        Raises TensorError where shapes do not go together, on all ranks alike also where those of ranks do not.
        """
        if rotary_pos_emb is not None:
            raise ModelError(
                "DistributedAttention: rotary_pos_emb is not built: rotate query and key before, by their positions in "
                "the whole sequence"
            )
        if batch_dim_idx is not None and batch_dim_idx != 1 - self.gather_idx:
            raise ModelError(
                f"DistributedAttention: batch_dim_idx {batch_dim_idx} with tokens in dimension {self.gather_idx}: "
                f"expected {1 - self.gather_idx}"
            )
        exchange = self._agreed(query, key, value)
        q, k, v = to_heads(exchange, query, key, value)
        if not exchange.heads.is_grouped(exchange.rank):
            each = torch.tensor(exchange.heads.key_of_each_query(exchange.rank), device=key.device)
            k, v = k.index_select(self.scatter_idx, each), v.index_select(self.scatter_idx, each)
        output = self.local_attn(q, k, v, *args, **kwargs)
        if output.dim() == 3:
            output = output.view(*output.shape[:2], q.shape[2], -1)
        if output.shape[:3] != q.shape[:3]:
            raise TensorError(
                f"DistributedAttention: local_attention gave {tuple(output.shape)} for a query {tuple(q.shape)}: "
                "expected the same layout",
                name="local_attention",
                expected=str(tuple(q.shape)),
                got=str(tuple(output.shape)),
            )
        return to_sequence(exchange, output)

    def _agreed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Exchange:
        """What the ranks have agreed on: the lengths of their parts are told, all else must be one."""
        wrong = self._problem(query, key, value)
        numbers = [int(wrong is not None)]
        if wrong is None:
            tokens = query.shape[self.gather_idx]
            numbers += [tokens, query.shape[1 - self.gather_idx], query.shape[2], query.shape[3], key.shape[2]]
            numbers += [value.shape[3], query.dtype.itemsize]
        numbers += [0] * (8 - len(numbers))
        every = gather_numbers(self.spg, numbers, query.device)
        if wrong is not None:
            raise wrong
        for rank, others in enumerate(every):
            if others[0]:
                raise ModelError(f"DistributedAttention: rank {rank} of the sequence group has refused its tensors")
            if others[2:] != numbers[2:]:
                raise TensorError(
                    "DistributedAttention: ranks of a sequence group have (batch, query heads, size, key heads, size "
                    f"of values, bytes) {numbers[2:]} here and {others[2:]} in rank {rank} of the group: expected the "
                    "same but for the tokens",
                    name="query",
                    expected=str(numbers[2:]),
                    got=str(others[2:]),
                )
        heads = Heads(query.shape[2], key.shape[2], len(every))
        rank = dist.get_rank(self.spg)
        lengths = tuple(others[1] for others in every)
        return Exchange(self.spg, rank, heads, lengths, self.scatter_idx, self.gather_idx)

    def _problem(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> TensorError | None:
        for name, tensor in zip(_NAMES, (query, key, value), strict=True):
            expected = (*query.shape[:2], key.shape[2] if tensor is not query and key.dim() == 4 else query.shape[-2])
            if tensor.dim() != 4 or tensor.shape[:3] != expected or tensor.dtype is not query.dtype:
                return TensorError(
                    f"DistributedAttention: {name} is {tuple(tensor.shape)} of {tensor.dtype}: expected 4 dimensions, "
                    f"the first of them {expected}, of {query.dtype}",
                    name=name,
                    expected=str(expected),
                    got=str(tuple(tensor.shape)),
                )
        if self.num_kv_heads is not None and key.shape[2] != self.num_kv_heads:
            return TensorError(
                f"DistributedAttention: key has {key.shape[2]} heads, and num_kv_heads is {self.num_kv_heads}",
                name="num_kv_heads",
                expected=str(self.num_kv_heads),
                got=str(key.shape[2]),
            )
        return None
