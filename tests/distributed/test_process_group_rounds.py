"""Engines one after the other in the same processes: groups made, left and made again, whoever makes them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from launching import PACKAGE, run_ranks

ROUNDS = """
import os, sys, threading, time
import torch
import torch.distributed as dist
from torch import nn
import zeroxide
from zeroxide import zero
from zeroxide.errors import BudgetError

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
ways = sys.argv[1].split(",")
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}},
    "zero_optimization": {"stage": 3},
}

# The connection to torch's store stays; rank 0 may have the store itself, with its listener and what it accepted.
STORE = 5

def sockets():
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            pass
    return sum("socket:" in each for each in links)

def build(seed):
    torch.manual_seed(seed)
    return nn.Linear(8, 8)

if ways[0] == "user's":
    dist.init_process_group("gloo")
for number, way in enumerate(ways):
    if way == "refused":
        threads, files = threading.active_count(), sockets()
        try:
            zeroxide.initialize(model=build(number), config={**settings, "zeroxide": {"host_memory": "1MiB"}})
            raise SystemExit("not refused")
        except BudgetError:
            assert threading.active_count() == threads, threading.enumerate()
            assert sockets() <= max(files, STORE), (files, sockets())
            assert not dist.is_initialized()
        continue
    if way == "user's again":
        dist.init_process_group("gloo")
    if way == "init_distributed":
        zeroxide.init_distributed(verbose=False)
    with zero.Init(enabled=way == "zero.Init"):
        model = build(number)
    engine = zeroxide.initialize(model=model, config=settings)[0]
    assert engine.world_size == 2
    engine.backward(engine(torch.ones(2, 8) * (rank + 1)).sum())
    engine.step()
    # The weight's gradient is the mean over ranks of 2 rows of 1 or 2: the same sign everywhere, so that Adam's first
    # step moves every weight by the rate, to within eps / gradient = 1e-8 / 3 of it and fp32's rounding of a weight.
    before = build(number).weight.detach()
    got = zeroxide.safe_get_full_fp32_param(model.weight)
    torch.testing.assert_close(got, before - 1e-2, rtol=0, atol=1e-6)
    # Ranks leave at different times, each of them first in turn.
    time.sleep(0.3 * ((rank + number) % 2))
    engine.destroy()
    assert dist.is_initialized() is (way != "own"), (number, way)
    if way in ("init_distributed", "user's again", "zero.Init"):
        dist.destroy_process_group()
print("done", flush=True)
"""


WAYS = {
    "own": ["own"] * 4,
    "the user's group": ["user's"] * 4,
    "a group of init_distributed": ["init_distributed"] * 4,
    "zero.Init before": ["zero.Init"] * 4,
    "after refusals": ["refused", "own", "refused", "refused", "own"],
    "in turn": ["own", "init_distributed", "zero.Init", "user's again", "own"],
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS.keys())
def test_rounds_under_torchrun(ways, tmp_path):
    """The agent's store outlives every group, and so do the addresses that the last one wrote there."""
    script = tmp_path / "rounds.py"
    script.write_text(ROUNDS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*launcher, str(script), ",".join(ways)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            out, err = process.communicate(timeout=90)
        finally:
            # The agent ends its workers; on time, nothing is left to end.
            process.terminate()
    assert process.returncode == 0, err.decode()
    assert out.decode().count("done") == 2


@pytest.mark.parametrize("ways", [WAYS["own"], WAYS["after refusals"], WAYS["in turn"]])
def test_rounds_where_rank_0_has_the_store(ways):
    for result in run_ranks(2, ROUNDS, [",".join(ways)], timeout=90, preamble="", fresh=True):
        assert (result.code, result.out) == (0, "done\n"), result.err
