"""What attention must know of sequences that ranks share: lengths, documents and padding, from all ranks together.

A rank knows the positions of its own tokens. Where one is not one more than that before it, another document begins,
also across the edge between two ranks (the convention of packed batches in transformers). Attention is causal by the
order of tokens, whatever their positions are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from zeroxide.errors import ModelError
from zeroxide.parallel.sequence.exchange import gather_numbers, gather_parts

__all__ = ["SequenceLayout", "gather_layout"]


@dataclass(frozen=True)
class SequenceLayout:
    """The sequences of a micro-batch: the same on all ranks that share them."""

    lengths: tuple[int, ...]
    """Tokens of each rank."""
    padding: torch.Tensor | None
    """(batch, tokens), bool: which tokens count; None where all do."""
    documents: tuple[tuple[tuple[int, int], ...], ...]
    """For each row (first, end) of its documents; one entry for all rows where each is one document."""

    @property
    def tokens(self) -> int:
        """Of a whole sequence."""
        return sum(self.lengths)

    @property
    def packed(self) -> bool:
        """Whether a row has several documents."""
        return any(len(row) > 1 for row in self.documents)

    def mask(self, causal: bool, window: int | None) -> torch.Tensor | None:
        """(batch or 1, 1, tokens, tokens), bool: who attends to whom; None where nothing but `causal` says so.

        window: how many tokens, itself among them, a token sees; None for all. Documents are not in it.
        """
        windowed = window is not None and window < self.tokens
        if self.padding is None and not windowed:
            return None
        device = None if self.padding is None else self.padding.device
        at = torch.arange(self.tokens, device=device if device is not None else "cpu")
        found = torch.ones((self.tokens, self.tokens), dtype=torch.bool, device=at.device)
        behind = at[:, None] - at[None, :]
        if causal:
            found &= behind >= 0
        if windowed:
            assert window is not None
            found &= behind < window if causal else behind.abs() < window
        if self.padding is None:
            return found[None, None]
        return found[None, None] & self.padding[:, None, None, :]


def gather_layout(
    group: Any, batch: int, positions: torch.Tensor, padding: torch.Tensor | None, causal: bool = True
) -> SequenceLayout:
    """The layout of the sequences of which this rank has `positions`, (batch or 1, tokens), and `padding`, (batch,
    tokens), bool, or None.

    With padding, documents are not looked for, as transformers does not look for them.

    Raises ModelError on all ranks alike where they do not have the same number of sequences.
    """
    rows, tokens = positions.shape
    numbers = gather_numbers(group, [batch, rows, tokens, int(padding is not None)], positions.device)
    for rank, other in enumerate(numbers):
        if other[:2] != numbers[0][:2] or other[3] != numbers[0][3]:
            raise ModelError(
                "ranks that share sequences have (sequences, rows of position_ids, tokens, attention_mask) "
                f"{numbers[0]} in rank 0 of the group and {other} in rank {rank}: expected the same but for the tokens"
            )
    lengths = tuple(each[2] for each in numbers)
    if padding is None and not causal:
        return SequenceLayout(lengths, None, (((0, sum(lengths)),),))
    mine = positions.to(torch.int64) if padding is None else padding.to(torch.int8)
    every = _gathered(group, mine, lengths)
    if padding is not None:
        counts = None if bool(every.all()) else every.to(torch.bool)
        return SequenceLayout(lengths, counts, (((0, sum(lengths)),),))
    breaks = every[:, 1:] - every[:, :-1] != 1
    if not bool(breaks.any()):
        return SequenceLayout(lengths, None, (((0, sum(lengths)),),))
    documents = []
    for row in breaks.expand(batch, -1):
        ends = [0, *(row.nonzero().flatten() + 1).tolist(), sum(lengths)]
        documents.append(tuple(pairwise(ends)))
    return SequenceLayout(lengths, None, tuple(documents))


def _gathered(group: Any, mine: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(rows, all tokens): the parts of all ranks in a row."""
    most = max(lengths)
    padded = torch.zeros((mine.shape[0], most), dtype=mine.dtype, device=mine.device)
    padded[:, : mine.shape[1]] = mine
    every = gather_parts(group, padded, "positions")
    return torch.cat([part[:, :count] for part, count in zip(every, lengths, strict=True)], 1)
