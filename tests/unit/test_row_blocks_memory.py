"""What matrices cut by rows take: what the plan says, and less the smaller the blocks are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import Mode, config_of, started
from torch import nn

from zeroxide.cli.configs.fit import fit
from zeroxide.cli.planning.request import Option, Request
from zeroxide.cli.planning.work import Workbench
from zeroxide.cli.training.models import choose_model
from zeroxide.config import load
from zeroxide.losses import linear_cross_entropy

VOCABULARY, WIDTH, MIB = 16384, 256, 1 << 20
MATRIX = VOCABULARY * WIDTH * 4
"""16 MiB in fp32."""
BUCKETS = ("weights", "gradients", "optimizer", "staging", "gathered", "total")


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.h = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = x + torch.tanh(block(x))
        return linear_cross_entropy(x, self.head.weight, ids)


def peaks(tied: bool, row_bytes: int | None, directory: Path) -> dict[str, int]:
    """Of two steps, by bucket; as planned."""
    config = config_of(Mode("nvme", "nvme", prefetch=0), directory, "fp32")
    config["zeroxide"] |= {"gradients": "disk"} | ({} if row_bytes is None else {"row_bytes": row_bytes})
    with started(Model(tied), config=config) as engine:
        for step in range(2):
            ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(step))
            engine.backward(engine(ids))
            engine.step()
        engine.finish_step()
        found = {name: usage["peak"] for name, usage in engine.memory().items() if name in BUCKETS}
        assert found == engine.plan().expected_peaks()
        return found


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_what_is_gathered_falls_with_the_blocks(tied: bool, tmp_path: Path) -> None:
    """Without blocks the matrices are gathered whole, and their gradients pile up as much; with them both are as large
    as a few blocks. Catches: blocks in one unit with others, blocks that stay gathered to the end of a pass, a plan
    that knows nothing of them."""
    whole, half, small = (peaks(tied, rows, tmp_path) for rows in (None, MATRIX // 2, MATRIX // 8))
    assert whole["gathered"] >= MATRIX
    assert whole["gradients"] >= MATRIX
    for bucket in ("gathered", "gradients", "total"):
        assert whole[bucket] > half[bucket] > small[bucket], bucket
    # One in use and one on its way.
    assert small["gathered"] <= 3 * MATRIX // 8
    assert small["gradients"] <= 4 * MATRIX // 8


def test_plans_of_models_that_are_not_there_know_the_blocks(tmp_path: Path) -> None:
    """`zeroxide plan` and `zeroxide config check --model`. Catches: a plan of the model in one piece. GPT-2's
    embedding, which is its projection as well, takes 50257 * 768 * 2 bytes, more than all of its blocks of rows."""
    home = {"device": "nvme", "nvme_path": str(tmp_path)}
    gathered = []
    for rows in ({}, {"row_bytes": "8MiB"}):
        config = {"zeroxide": {**rows, "prefetch": 0}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
        config["optimizer"] = {"type": "AdamW"}
        bench = Workbench(choose_model("gpt2"), ["split"], None, None, 1, lambda rehearsals: None)  # type: ignore[arg-type]
        request = Request("gpt2", 1, 8, disk=tmp_path, config=config)
        plan = bench.plan(request, Option("nvme", "split"), torch.bfloat16, 0)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        config["zero_optimization"] |= {"offload_param": home, "offload_optimizer": home}
        said = "\n".join(fit(load(config), str(tmp_path), 1, 1)[0])
        gathered.append((plan.buckets["gathered"], said))
    (whole, said), (small, less) = gathered
    assert whole >= 50257 * 768 * 2
    assert small < whole // 2
    assert said != less
