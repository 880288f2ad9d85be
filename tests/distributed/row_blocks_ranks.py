"""Two ranks train a model whose matrices are cut by rows, each on ids of other blocks: against plain torch in double.

Arguments: stage, transport, "tied" or "apart", and a folder.

The tolerance is that of tests/unit/test_row_blocks.py: gradients are sums of at most 1000 products, here of two ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import zeroxide
from zeroxide.losses import linear_cross_entropy
from zeroxide.rows import blocks_of

VOCABULARY, WIDTH = 1000, 16
BLOCK = 256 * WIDTH * 4
torch.set_num_threads(1)
stage, transport, kind, folder = sys.argv[1:]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.h = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if kind == "tied":
            self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = x + torch.tanh(block(x))
        if kind == "tied":
            return linear_cross_entropy(x, self.head.weight, ids, linear_bias=self.head.bias)
        return functional.cross_entropy(self.head(x).flatten(0, -2), ids.flatten())


def batch(step: int, rank: int) -> torch.Tensor:
    """Rank 0 has ids of all blocks, and the other of the third alone."""
    found = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(10 * step + rank))
    return found if rank == 0 else 520 + found % 200


def made(rows: int | None) -> zeroxide.Engine:
    config = {
        "zero_optimization": {"stage": int(stage)},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 0,
        "zeroxide": {"threads": 1, "transport": transport, **({} if rows is None else {"row_bytes": rows})},
    }
    return zeroxide.initialize(model=Model(), config=config)[0]


engine = made(BLOCK)
assert len(blocks_of(engine.module.wte)) == 4
for step in range(2):
    engine.backward(engine(batch(step, engine.ranks.rank)))
    engine.step()
engine.save_checkpoint(folder)
own, found = engine.module.state_dict(), engine.module_state_dict()
engine.destroy()

plain = Model().double()
optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
for step in range(2):
    optimizer.zero_grad()
    for rank in range(2):
        (plain(batch(step, rank)) / 2).backward()
    optimizer.step()
for name, values in plain.state_dict().items():
    torch.testing.assert_close(own[name].double(), values, rtol=0, atol=1e-5, msg=name)

engine = made(None)
engine.load_checkpoint(Path(folder))
again = engine.module_state_dict()
engine.destroy()
if found:
    assert set(again) == set(found) == set(own)
    assert all(torch.equal(again[name], values) and torch.equal(own[name], values) for name, values in found.items())
print("same", flush=True)
