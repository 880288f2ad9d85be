"""The process's peak since an engine was made, compared with what /proc shows from outside."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from zeroxide import _core
from zeroxide.engine.peak import FRAGMENTS, Peak, room_in_budget

MIB = 1 << 20

PROGRAM = """
import os, sys, tempfile
import torch
from torch import nn
import zeroxide
from zeroxide import _core
from zeroxide.errors import BudgetError

torch.set_num_threads(1)
if sys.argv[1] == "refused":
    _core.reset_peak = lambda: False
MIB = 1 << 20

def spike(mib):
    held = torch.ones(mib * MIB // 4)
    del held

spike(600)
now = _core.resident()["rss"]
model = nn.Linear(16, 16)
zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": sys.argv[2]}}
config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": zero,
    "zeroxide": {"host_memory": now + 200 * MIB, "staging_bytes": 1 << 20},
}
engine = zeroxide.initialize(model=model, config=config)[0]

def ask(what):
    # The parent looks at /proc/PID/status before it answers.
    print(what, engine.memory()["process"]["peak"], engine.memory()["process"]["exact"], flush=True)
    sys.stdin.readline()

def step():
    engine.backward(engine(torch.ones(2, 16)).sum())
    engine.step()

step()
ask("calm")
if sys.argv[1] != "refused":
    spike(500)
    try:
        step()
        print("not refused", flush=True)
    except BudgetError as error:
        assert error.need > error.limit
        ask("over")
    step()
    ask("calm again")
print("done", flush=True)
"""


def status(pid, field):
    """Bytes, as the kernel tells everybody."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


@pytest.mark.parametrize("way", ["reset", "refused"])
def test_what_came_before_an_engine_does_not_count(way, tmp_path):
    """A process that once held 600 MiB more trains under 200; one that then takes 500 is told, once."""
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), way, str(tmp_path)]
    heard = {}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        for line in child.stdout:
            words = line.rsplit(maxsplit=2)
            if len(words) < 3:
                heard[line.strip()] = None
                continue
            what, peak, exact = words
            heard[what] = (int(peak), exact == "True", status(child.pid, "VmHWM"), status(child.pid, "VmRSS"))
            child.stdin.write("\n")
            child.stdin.flush()
        code = child.wait(60)
        errors.seek(0)
        assert code == 0, errors.read().decode()
    assert "not refused" not in heard
    assert "done" in heard
    peak, exact, kernel, resident = heard["calm"]
    assert exact is (way == "reset")
    # The kernel counts pages of a thread in batches of 64; asking takes a little memory itself.
    slack = 8 * MIB
    if exact:
        assert abs(peak - kernel) < slack
        assert abs(heard["over"][0] - heard["calm"][0]) > 250 * MIB
        assert heard["calm again"][0] == heard["over"][0], "the peak since the beginning stays"
        assert heard["calm again"][2] < heard["over"][0] - 250 * MIB, "and the next step is measured by itself"
    else:
        assert kernel > peak + 400 * MIB, "the kernel's peak is that of before"
        assert resident <= peak


def test_several_count_side_by_side(monkeypatch):
    """With a kernel made by hand: whoever resets its peak takes nothing from the others."""
    kernel = {"rss": 100, "peak": 500}

    def reach(rss):
        kernel["peak"] = max(kernel["peak"], rss)

    def reset():
        kernel["peak"] = kernel["rss"]
        return True

    monkeypatch.setattr(_core, "resident", lambda: dict(kernel))
    monkeypatch.setattr(_core, "reset_peak", reset)
    first = Peak()
    assert (first.most(), first.at_start) == (100, 100)
    reach(300)
    second = Peak()
    assert (first.most(), second.most()) == (300, 100)
    reach(200)
    second.start_over()
    reach(150)
    assert (first.most(), second.most(), second.since_start_over()) == (300, 200, 150)
    assert first.since_start_over() == 300


def test_room_in_a_budget(monkeypatch):
    """Of what is planned and taken, and of what is resident, the greater counts. Catches: one of them left out."""
    monkeypatch.setattr(_core, "resident", lambda: {"rss": 500 * MIB, "peak": 900 * MIB})
    limit = int(800 * MIB * FRAGMENTS) + 1
    assert room_in_budget(None, 0, 0) is None
    assert room_in_budget(limit, 400 * MIB, 50 * MIB) == 300 * MIB
    assert room_in_budget(limit, 400 * MIB, 150 * MIB) == 250 * MIB
    assert room_in_budget(limit, 900 * MIB, 0) == 0
