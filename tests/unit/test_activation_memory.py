"""What memory a process has whose activations wait on disk, and what a budget leaves there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zeroxide.zero.activations_on_disk import Budget

PROGRAM = """
import sys, torch
from torch import nn
import zeroxide
from zeroxide import _core

home, folder, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(24)))
own = {} if home == "memory" else {"activation_path": folder, "activation_buffers": 8 << 20}
if limit:
    own["host_memory"] = limit
config = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3},
    "zeroxide": {"threads": 1, "activations": home, **own},
    "gradient_clipping": 0.0,
}
x = torch.randn(12288, 256)
engine = zeroxide.initialize(model=model, config=config)[0]
engine.parts.peak.start_over()
before = _core.resident()["rss"]
for step in range(3):
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
store = engine.parts.activations
room = 0 if store is None or store.budget is None else store.budget.room
peak = engine.parts.peak.since_start_over()
written = 0 if store is None else store.file.written
print(peak - before, loss.item().hex(), peak, written, room)
"""
ACTIVATION = 12288 * 256 * 4
"""Bytes of one of the 24 that the model saves: what each layer gives, which is what the next one takes."""


def ran(home: str, folder: Path, limit: int = 0) -> tuple[int, str, int, int, int]:
    """What the steps have added to the resident memory, the last loss, the process's peak, bytes written, and the room
    for activations that a budget left."""
    command = [sys.executable, "-c", PROGRAM, home, str(folder), str(limit)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    return int(said[0]), said[1], int(said[2]), int(said[3]), int(said[4])


@pytest.fixture(scope="module")
def all_in_memory(tmp_path_factory) -> tuple[int, str, int, int, int]:
    return ran("memory", tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def all_on_disk(tmp_path_factory) -> tuple[int, str, int, int, int]:
    return ran("disk", tmp_path_factory.mktemp("disk"))


def test_memory_is_that_of_the_buffers(all_in_memory, all_on_disk):
    """24 activations of 12 MiB are in memory together at the end of forward, and on disk 8 MiB of buffers and what a
    layer takes, gives and computes in backward, which is there in both. Catches: a tensor that something keeps."""
    plain, kept = all_in_memory, all_on_disk
    assert kept[1] == plain[1]
    assert plain[0] > 24 * ACTIVATION
    assert kept[0] < plain[0] - 20 * ACTIVATION
    assert kept[3] >= 3 * 22 * ACTIVATION


def test_a_budget_leaves_in_memory_what_it_has_room_for(all_in_memory, all_on_disk, tmp_path):
    """Catches: a budget that is exceeded, one that sends everything to the disk, and other bits."""
    plain, kept = all_in_memory, all_on_disk
    limit = (kept[2] + plain[2]) // 2
    found = ran("auto", tmp_path, limit)
    assert found[1] == plain[1]
    assert found[2] <= limit
    # Less than what all steps of the other wrote by what has room, in each step but the first.
    assert found[4] >= 6 * ACTIVATION
    assert kept[3] - found[3] >= 2 * (found[4] - 2 * ACTIVATION)


def test_what_a_budget_keeps():
    """The first pass sends all of 10 bytes to the disk. With room for 4 the first 6 go there and the last 4 stay; and
    room for all leaves all. Catches: what has ended and counts on, a pass that exceeds the room."""
    for room, stays in ((4, [False] * 6 + [True] * 4), (10, [True] * 10), (0, [False] * 10)):
        known: list[int | None] = [None, room]
        budget = Budget(lambda known=known: known.pop(0))
        for expected in ([False] * 10, stays, stays):
            budget.begin()
            found = [budget.keeps(1) for _ in range(10)]
            assert found == expected
            for each in found:
                budget.end(1, stayed=each)
    budget.begin()
    assert (budget.kept, budget.stowed) == (0, 0)
