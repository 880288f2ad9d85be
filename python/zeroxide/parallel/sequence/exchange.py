"""Ulysses' exchange (Jacobs et al. 2023, section 3): from a part of the sequence with all heads to the sequence with a
part of the heads, and back.

Rank r of P has s_r tokens, and takes heads [first_r, end_r) of each tensor. On the way there it sends every rank j the
heads of that rank: batch * s_r * heads_j * size elements for each tensor; on the way back batch * s_j * heads_r * size.
Neither heads nor tokens need divide: blocks differ by one, and travel as they are. Where there are fewer key heads than
ranks, a key head goes to every rank whose query heads attend to it, and its gradient is the sum of theirs, in rank
order and in fp32.

Everything is bytes on its way, so that every dtype travels over every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from zeroxide.distributed import COMMS, first_line
from zeroxide.errors import ModelError, RanksError

__all__ = ["EXCHANGES", "Exchange", "Heads", "gather_numbers", "gather_parts", "to_heads", "to_sequence"]


@dataclass
class _Exchanges:
    """What this process has exchanged of sequences."""

    count: int = 0


EXCHANGES = _Exchanges()

Blocks = tuple[tuple[int, int], ...]
"""(first, end) of each rank."""


def _cut(count: int, parts: int) -> Blocks:
    """`count` in `parts` that differ by one at most, the larger ones first."""
    small, larger = divmod(count, parts)
    ends = [small * part + min(part, larger) for part in range(parts + 1)]
    return tuple(pairwise(ends))


@dataclass(frozen=True)
class Heads:
    """Which heads each of `world` ranks takes of `queries` query heads and `keys` key (and value) heads.

    Query head h attends to key head h // (queries / keys). With as many key heads as ranks or more, ranks take whole
    groups of query heads, and no key head travels twice.
    """

    queries: int
    keys: int
    world: int

    def __post_init__(self) -> None:
        if self.keys < 1 or self.queries % self.keys:
            raise ModelError(
                f"{self.queries} query heads over {self.keys} key heads: expected a multiple, so that each key head "
                "has a group of query heads"
            )
        if self.queries < self.world:
            raise ModelError(
                f"{self.queries} attention heads over {self.world} ranks of a sequence group leave ranks without a "
                f"head: use a sequence_parallel_size of at most {self.queries}, or ring attention "
                "(zeroxide.parallel.sequence.ring_attention)"
            )

    @property
    def group(self) -> int:
        """Query heads that attend to one key head."""
        return self.queries // self.keys

    @property
    def query_blocks(self) -> Blocks:
        """Query heads of each rank."""
        if self.keys >= self.world:
            return tuple((first * self.group, end * self.group) for first, end in _cut(self.keys, self.world))
        return _cut(self.queries, self.world)

    @property
    def key_blocks(self) -> Blocks:
        """Key heads that the query heads of each rank attend to."""
        return tuple((first // self.group, -(-end // self.group)) for first, end in self.query_blocks)

    def key_of_each_query(self, rank: int) -> list[int]:
        """For each query head of the rank, its key head's number among those of the rank."""
        (first, end), (first_key, _) = self.query_blocks[rank], self.key_blocks[rank]
        return [head // self.group - first_key for head in range(first, end)]

    def is_grouped(self, rank: int) -> bool:
        """Whether as many query heads of the rank attend to each of its key heads."""
        keys = self.key_of_each_query(rank)
        return len({keys.count(key) for key in keys}) == 1


@dataclass(frozen=True)
class Exchange:
    """What ranks have agreed on before they exchange."""

    group: Any
    """The process group of the ranks that share sequences."""
    rank: int
    heads: Heads
    lengths: tuple[int, ...]
    """Tokens of each rank."""
    head_dim: int
    """Of the tensors: which dimension counts heads."""
    sequence_dim: int

    @property
    def world(self) -> int:
        """Ranks that share sequences."""
        return len(self.lengths)

    def carry(self, incoming: torch.Tensor, outgoing: torch.Tensor, back: list[int], out: list[int]) -> None:
        """`out[r]` bytes of `outgoing` go to rank r of the group, and `back[r]` of `incoming` come from it."""
        dist.all_to_all_single(incoming, outgoing, back, out, group=self.group)

    @property
    def tokens(self) -> Blocks:
        """(first, end) of each rank's tokens in the whole sequence."""
        ends = [sum(self.lengths[:rank]) for rank in range(self.world + 1)]
        return tuple(pairwise(ends))


def to_heads(
    exchange: Exchange, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of this rank's tokens with all heads become those of all tokens with this rank's heads."""
    heads = exchange.heads
    blocks = (heads.query_blocks, heads.key_blocks, heads.key_blocks)
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _Travel.apply(exchange, True, blocks, query, key, value)
    return found


def to_sequence(exchange: Exchange, output: torch.Tensor) -> torch.Tensor:
    """The output of all tokens with this rank's heads becomes that of this rank's tokens with all heads."""
    (found,) = _Travel.apply(exchange, False, (exchange.heads.query_blocks,), output)
    result: torch.Tensor = found
    return result


class _Travel(torch.autograd.Function):
    """One way; backward is the other."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, there: bool, blocks: tuple[Blocks, ...], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange, ctx.there, ctx.blocks = exchange, there, blocks
        return _travel(exchange, there, blocks, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        found = _travel(ctx.exchange, not ctx.there, ctx.blocks, gradients)
        return (None, None, None, *found)


def _travel(
    exchange: Exchange, there: bool, blocks: tuple[Blocks, ...], tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    EXCHANGES.count += 1
    dims = (exchange.head_dim, exchange.sequence_dim)
    # [heads, tokens, ...]: what goes to a rank is a block of rows, or of columns.
    given = [tensor.movedim(dims, (0, 1)) for tensor in tensors]
    rests = [each.shape[2:] for each in given]
    tokens, rank, world = exchange.tokens, exchange.rank, exchange.world
    sends: list[torch.Tensor] = []
    shapes: list[list[tuple[int, ...]]] = []
    for other in range(world):
        pieces, coming = [], []
        for each, block, rest in zip(given, blocks, rests, strict=True):
            mine, theirs = block[rank], block[other]
            if there:
                pieces.append(each[theirs[0] : theirs[1]])
                coming.append((mine[1] - mine[0], exchange.lengths[other], *rest))
            else:
                pieces.append(each[:, tokens[other][0] : tokens[other][1]])
                coming.append((theirs[1] - theirs[0], exchange.lengths[rank], *rest))
        sends.append(torch.cat([piece.reshape(-1) for piece in pieces]))
        shapes.append(coming)
    received = _all_to_all(exchange, sends, [sum(_numel(shape) for shape in coming) for coming in shapes])
    found = []
    parts = [
        torch.split(message, [_numel(shape) for shape in coming])
        for message, coming in zip(received, shapes, strict=True)
    ]
    for at, block in enumerate(blocks):
        of_ranks = [parts[other][at].view(shapes[other][at]) for other in range(world)]
        found.append((torch.cat(of_ranks, 1) if there else _rows(of_ranks, block)).movedim((0, 1), dims))
    return tuple(found)


def _rows(parts: list[torch.Tensor], block: Blocks) -> torch.Tensor:
    """All heads from the blocks of each rank; what several ranks have of a head is summed."""
    if all(before[1] == after[0] for before, after in pairwise(block)):
        return torch.cat(parts, 0)
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = torch.zeros((block[-1][1], *parts[0].shape[1:]), dtype=wide, device=parts[0].device)
    for (first, end), part in zip(block, parts, strict=True):
        total[first:end] += part
    return total.to(parts[0].dtype)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _all_to_all(exchange: Exchange, sends: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
    """One message to every rank and one from each, of `counts` elements."""
    dtype, rank = sends[0].dtype, exchange.rank
    size = dtype.itemsize
    ours = sends[rank]
    out = [each.numel() * size * (other != rank) for other, each in enumerate(sends)]
    back = [count * size * (other != rank) for other, count in enumerate(counts)]
    # What a rank sends itself stays where it is.
    outgoing = torch.cat([each for other, each in enumerate(sends) if other != rank]).view(torch.uint8)
    incoming = outgoing.new_empty(sum(back))
    logged = COMMS.begin("all_to_all", incoming.numel(), exchange.world, what="of sequences") if COMMS.enabled else None
    try:
        exchange.carry(incoming, outgoing, back, out)
    except RuntimeError as error:
        raise RanksError(
            f"exchanging heads for tokens among {exchange.world} ranks failed: {first_line(error)}; another rank has "
            "probably ended: look at what each of them printed last"
        ) from error
    COMMS.end(logged)
    found = []
    for other, message in enumerate(torch.split(incoming, back)):
        found.append(ours if other == rank else message.view(dtype))
    return found


def gather_numbers(group: Any, numbers: Sequence[int], device: torch.device | str) -> list[list[int]]:
    """What each rank of the group gave: as many whole numbers each."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    return [each.tolist() for each in gather_parts(group, mine, "lengths")]


def gather_parts(group: Any, mine: torch.Tensor, what: str) -> list[torch.Tensor]:
    """The tensor of each rank of the group, all of one shape and dtype; `what` they are, for messages."""
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    size = mine.nbytes * (len(every) - 1)
    logged = COMMS.begin("all_gather", size, len(every), what=f"of {what}") if COMMS.enabled else None
    try:
        dist.all_gather(every, mine, group=group)
    except RuntimeError as error:
        raise RanksError(
            f"gathering the {what} of {len(every)} parts of a sequence failed: {first_line(error)}; another rank has "
            "probably ended: look at what each of them printed last"
        ) from error
    COMMS.end(logged)
    return every
