"""What the tests here share: small models, their training, and programs in processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as functional
from forking import ForkServer
from torch import nn
from torch.utils.checkpoint import checkpoint

TESTS = Path(__file__).parents[1]
LOADED = """
import sys
import torch
from simulated import device
device.load()
"""


@cache
def server() -> ForkServer:
    return ForkServer()


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which has the device loaded and not used, and no thread but its first."""
    with tempfile.TemporaryDirectory() as folder:
        program, out, err = (Path(folder) / name for name in ("program.py", "out", "err"))
        program.write_text(LOADED + script)
        paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        process = server().fork(program, args, {**os.environ, "PYTHONPATH": paths}, out, err)
        try:
            code = process.wait(timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess([str(program), *args], code, out.read_text(), err.read_text())


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attended, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = [
            each.view(batch, length, 2, width // 2).transpose(1, 2)
            for each in self.attended(self.before(x)).split(width, dim=2)
        ]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        # The operator that both kinds of device have; `dropout` composes another one for the host.
        dropped, _ = torch.native_dropout(self.down(functional.gelu(self.up(self.between(x)))), self.dropout, True)
        return x + dropped


class Model(nn.Module):
    def __init__(self, *, checkpointed: bool = False, dropout: float = 0.25) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16)
        self.blocks = nn.ModuleList(Block(16, dropout) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 23)
        self.checkpointed = checkpointed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens.flatten())


def trained(
    device: str, dtype: torch.dtype, *, checkpointed: bool = False, autocast: bool = False
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of three steps, and the weights after them."""
    torch.manual_seed(0)
    model = Model(checkpointed=checkpointed).to(device, dtype)
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    numbers = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        tokens = torch.randint(0, 23, (2, 7), generator=numbers).to(device)
        with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [each.detach().cpu() for each in model.parameters()]
