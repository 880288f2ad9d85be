"""Models whose ranks differ in what they use, beside those of `models`: batches here are chosen by their number."""

from __future__ import annotations

from typing import Any

import torch
from models import FAMILIES, LENGTH, VOCABULARY, WIDTH, Batch, Block, Family, Gpt, next_token_loss
from torch import nn
from torch.nn import functional

BLOCKS = 4


class Routed(nn.Module):
    """Every token goes to one of three experts; an expert that no token of the batch chose does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in range(3)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chances = functional.softmax(self.router(hidden), -1)
        chance, choice = chances.max(-1)
        output = hidden.clone()
        for number, expert in enumerate(self.experts):
            chosen = choice == number
            if chosen.any():
                output[chosen] = output[chosen] + chance[chosen].unsqueeze(-1) * expert(hidden[chosen])
        return output


class Mixture(Gpt):
    """A mixture of experts in every block. Batches of one token make most experts idle on most ranks."""

    def __init__(self) -> None:
        super().__init__(0)
        self.h = nn.ModuleList(Routed() for _ in range(3))


class SkipsBlocks(Gpt):
    """Whole blocks, which are units, run or not as the batch says: on some ranks only, in some steps on none."""

    def __init__(self) -> None:
        super().__init__(BLOCKS)

    def forward(self, input_ids: torch.Tensor, run: torch.Tensor) -> Any:
        hidden = self.wte(input_ids)
        for block, wanted in zip(self.h, run.tolist(), strict=True):
            if wanted:
                hidden = block(hidden)
        return next_token_loss(self.head(self.norm(hidden)), input_ids)


class Branches(nn.Module):
    """Lists of blocks of which the first two are never used in one batch, and a parameter that is used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(3))
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, run: torch.Tensor) -> Any:
        hidden = self.h[int(run[0])](self.wte(input_ids))
        hidden = self.h[2](hidden) * self.gain
        return {"nested": [None, {"losses": (next_token_loss(self.head(hidden), input_ids),)}]}


def one_row(generator: torch.Generator, rows: int) -> Batch:
    """Tokens of a few kinds, so that the experts' loads differ between batches."""
    start = torch.randint(0, VOCABULARY - 4, (1,), generator=generator)
    return {"input_ids": start + torch.randint(0, 2, (rows, 4), generator=generator)}


def skipping(generator: torch.Generator, rows: int) -> Batch:
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    return {"input_ids": ids, "run": torch.randint(0, 2, (BLOCKS,), generator=generator)}


DISTRIBUTED: dict[str, Family] = {
    **FAMILIES,
    "mixture": Family(Mixture, one_row),
    "skips-blocks": Family(SkipsBlocks, skipping),
    "branches": Family(Branches, skipping),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The family's model in training mode, the same one for the same seed."""
    torch.manual_seed(seed)
    return DISTRIBUTED[name].build().train()


def micro_batch(name: str, number: int, rows: int = 2) -> Batch:
    """The micro-batch of that number: the same whichever rank takes it."""
    return DISTRIBUTED[name].batch(torch.Generator().manual_seed(1000 + number), rows)
