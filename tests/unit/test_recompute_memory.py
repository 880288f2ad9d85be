"""Memory of a process whose blocks compute their activations again, beside what a rehearsal from shapes expects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from zeroxide.plan.recompute import first_blocks
from zeroxide.profiling.rehearsal import Rehearsal, rehearse
from zeroxide.zero.activations_on_disk import MIN_BYTES
from zeroxide.zero.recompute import recompute

WIDTH, BLOCKS, ROWS = 64, 10, 24576
ACTIVATION = WIDTH * ROWS * 4
"""Bytes of what a block takes and gives, and of each of the two that it keeps beside."""
BUFFERS = 8 << 20
CLOSE = 0.05
"""Of the process: what a plan may be off by."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)).square())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


PROGRAM = """
import sys, torch
import zeroxide
from zeroxide import _core
from test_recompute_memory import BUFFERS, ROWS, WIDTH, Stack

asked, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)
own = {"activations": "disk", "activation_path": folder, "activation_buffers": BUFFERS} if folder else {}
config = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
config["zeroxide"] = {"threads": 1, "recompute": asked, **own}
engine = zeroxide.initialize(model=Stack(), config=config)[0]
if not asked:
    # As it is where blocks are recomputed: no holes are left, and activations alone are counted.
    _core.keep_freed_memory(1 << 20)
engine.parts.peak.start_over()
x = torch.randn(ROWS, WIDTH)
for step in range(2):
    loss = engine(x)
    engine.backward(loss)
    engine.step()
store = engine.parts.activations
print(engine.parts.peak.since_start_over(), loss.item().hex(), 0 if store is None else store.file.most)
"""


def ran(asked: int, folder: Path | None = None) -> tuple[int, str, int]:
    """The process's peak in training, the last loss, and most bytes of activations on disk."""
    command = [sys.executable, "-c", PROGRAM, str(asked), "" if folder is None else str(folder)]
    path = ":".join([str(Path(__file__).parent), *(each for each in sys.path if each)])
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    return int(said[0]), said[1], int(said[2])


def rehearsed(asked: int, stowed_from: int | None = None) -> Rehearsal:
    with torch.device("meta"):
        model = Stack()
    recompute(first_blocks(model, asked).modules, has_values=False)
    return rehearse(model, lambda: model(torch.zeros(ROWS, WIDTH)), stowed_from)


@pytest.mark.parametrize("asked", [0, 4, BLOCKS])
def test_a_rehearsal_knows_what_blocks_keep(asked):
    """A block keeps what tanh gives and its square beside its input; the last one's output is the loss's. Catches:
    blocks that are counted as recomputed and keep all, and inputs that are not counted."""
    found = rehearsed(asked)
    kept = (2 * (BLOCKS - asked) + BLOCKS + 1) * ACTIVATION
    # Generators' states, 5,056 bytes a block, and the loss.
    assert abs(found.kept - kept) <= BLOCKS * 8192
    # The last product of a block is needed by nobody, and torch stops before it.
    assert found.backward.flops - rehearsed(0).backward.flops == asked * 2 * ROWS * WIDTH * WIDTH


def test_the_process_is_what_a_rehearsal_expects(tmp_path):
    """Some blocks computed again, what others keep on disk but for what is in the buffers; beside that what a process
    takes that keeps all. Catches: what is kept of a block that is computed again, and memory that the allocator holds
    though nobody has it."""
    plain, found = ran(0), ran(4, tmp_path)
    expected = rehearsed(4, MIN_BYTES)
    process = plain[0] - rehearsed(0).peak + expected.peak + BUFFERS
    assert found[1] == plain[1]
    assert abs(found[0] - process) <= CLOSE * found[0]
    assert found[0] < plain[0] - 10 * ACTIVATION
    assert abs(found[2] - expected.stowed) <= 2 * BUFFERS
