"""A model with a vocabulary, and how it is trained in plain torch and by an engine that has it in blocks of rows.

The oracle is the model in plain torch, in one process and in double precision where numbers are compared. An engine in
fp32 differs from it by roundings: each of the two steps of SGD that are taken moves a weight by lr = 0.1 times a
gradient. A gradient here is a sum of at most 1000 products (the vocabulary, over which the head's input gradient is
summed) of numbers below 4, so its error is at most 1000 * 2^-24 * 4 * 4 < 1e-3 in the worst case and, as errors of
random sign add up, about sqrt(1000) * 2^-24 * 16 = 3e-5; the weights are compared to 1e-5, which is 0.1 times that over
two steps with a factor to spare, and what a mutation does is 1e-2 or more.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zeroxide.losses import linear_cross_entropy

VOCABULARY, WIDTH, PADDING = 1000, 16, 300
BLOCK = 256 * WIDTH * 4
"""Bytes of 256 rows in fp32: four blocks, of which the last has 232."""
TOLERANCE = {"rtol": 0, "atol": 1e-5}


class Model(nn.Module):
    def __init__(self, tied: bool = False, bias: bool = True, loss: str = "logits") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.wte = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.h = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = x + torch.tanh(block(x))
        if self.loss == "logits":
            return functional.cross_entropy(self.head(x).flatten(0, -2), targets.flatten())
        return linear_cross_entropy(x, self.head.weight, targets, linear_bias=self.head.bias, columns=100)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with the padding and one that comes twice; beside these, of the first block alone in the second batch."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (3, 7), generator=generator) % (VOCABULARY if step == 0 else 250)
    ids[0, 0], ids[0, 1], ids[1, 1] = PADDING, 5, 5
    return ids, torch.randint(0, VOCABULARY, (3, 7), generator=generator)


def cut(config: dict[str, Any], row_bytes: int | str | None = BLOCK) -> dict[str, Any]:
    return config | {"zeroxide": config.get("zeroxide", {}) | ({} if row_bytes is None else {"row_bytes": row_bytes})}


def train(engine: Any, first: int = 0, steps: int = 2) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def trained_plainly(model: nn.Module, steps: int = 2) -> dict[str, torch.Tensor]:
    plain = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(steps):
        plain(*batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain.state_dict()


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        assert found[name].shape == values.shape, name
        torch.testing.assert_close(found[name].double(), values, **TOLERANCE, msg=name)
