"""How ranks find one another, and who owns the process group. Real processes over gloo."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from launching import PACKAGE, Job, free_port, run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from zeroxide.distributed import Ranks, Watch, agree, init_distributed, start
from zeroxide.distributed import collectives as place
from zeroxide.errors import RanksError

COLLECTIVES = """
import json
import torch.distributed as dist
from zeroxide.distributed import all_gather_single

words = "e\u00e9" * (500 * ranks.rank)
objects = ranks.gather_objects({"rank": ranks.rank, "list": [1, None, 0.1], "words": words})
assert objects == [{"rank": r, "list": [1, None, 0.1], "words": "e\u00e9" * (500 * r)} for r in range(ranks.world)]
source = ranks.world - 1
tensor = ranks.broadcast_tensor(torch.full((3, 2), ranks.rank, dtype=torch.bfloat16), source)
assert tensor.tolist() == [[source] * 2] * 3
ranks.barrier()
if ranks.group is not None:
    whole = torch.empty(2 * ranks.world)
    all_gather_single(whole, torch.tensor([ranks.rank + 0.5, -ranks.rank]), ranks.group)
    assert whole.tolist() == [value for r in range(ranks.world) for value in (r + 0.5, -r)]
say(json.dumps({
    "rank": ranks.rank, "world": ranks.world, "local": [ranks.local_rank, ranks.local_world],
    "owned": ranks.owned, "same_host": ranks.same_host,
    "grouped": ranks.group is not None,
    "initialized": dist.is_initialized(),
}))
ranks.close()
ranks.close()
say("initialized" if dist.is_initialized() else "closed")
"""


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_over_gloo(world):
    results = run_ranks(world, COLLECTIVES, fresh=True)
    for rank, result in enumerate(results):
        assert result.code == 0, result.err
        first, last = result.out.splitlines()
        assert json.loads(first) == {
            "rank": rank,
            "world": world,
            "local": [rank, world],
            "owned": world > 1,
            "same_host": True,
            "grouped": world > 1,
            "initialized": world > 1,
        }
        assert last == "closed"


EXISTING = """
import os, sys
import torch, torch.distributed as dist
rank, world = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
dist.init_process_group(sys.argv[1], rank=rank, world_size=world, init_method="env://")
mine = dist.group.WORLD
from zeroxide.distributed import start
ranks = start()
assert (ranks.rank, ranks.world, ranks.local_rank, ranks.local_world) == (rank, world, rank, world)
assert not ranks.owned
assert ranks.gather_objects(rank) == list(range(world))
ranks.barrier()
assert ranks.own_group == (ranks.group is not mine) == (sys.argv[1] == "cuda:gloo")
ranks.close()
assert dist.group.WORLD is mine
dist.barrier(device_ids=None) if sys.argv[1] == "gloo" else None
dist.destroy_process_group()
"""


@pytest.mark.parametrize("backend", ["gloo", "cuda:gloo"])
def test_an_existing_group_is_used_and_not_destroyed(tmp_path, backend):
    """The second backend takes no tensors in host memory, as NCCL does not."""
    script = tmp_path / "existing.py"
    script.write_text(EXISTING)
    for result in run_ranks(2, script, [backend], fresh=True):
        assert result.code == 0, result.err


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_an_existing_group_of_one_rank_is_used(no_launcher):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = start()
        assert (ranks.world, ranks.local_world, ranks.owned, ranks.group) == (1, 1, False, dist.group.WORLD)
        ranks.close()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_single_rank_has_no_process_group(no_launcher):
    ranks = start()
    agree(ranks, {"a": 1})
    before = threading.active_count()
    with Watch(ranks) as watch, watch.waiting("barrier"):
        ranks.barrier()
        assert threading.active_count() == before
    assert (ranks.world, ranks.group) == (1, None)
    assert not dist.is_initialized()
    ranks.close()


def test_neither_zeroxide_nor_its_ranks_load_torch():
    source = (
        "import sys, zeroxide; print(sorted({'torch', 'zeroxide.distributed'} & set(sys.modules))); "
        "import zeroxide.distributed; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], env={"PYTHONPATH": str(PACKAGE)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["[]", "False"]


def test_a_rank_that_never_comes_is_one_line(no_launcher, monkeypatch):
    port = free_port()
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RanksError) as caught:
        start(timeout_seconds=1)
    line = str(caught.value)
    where = f"tcp://127.0.0.1:{port}"
    assert line.startswith(f"rank 0 of 2 (told by torchrun) could not meet the others at {where} within 1 s: ")
    assert "\n" not in line
    assert not dist.is_initialized()


def test_the_fake_group_answers_as_if_all_ranks_said_the_same():
    """torch's group without other ranks, for schedules of jobs that are too large to start."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=128)
    try:
        ranks = start()
        assert (ranks.rank, ranks.world, ranks.alone) == (3, 128, True)
        assert ranks.gather_objects([3]) == [[3]] * 128
        Watch(ranks).close()
    finally:
        dist.destroy_process_group()


# init_distributed ---------------------------------------------------------------------------------------------------


def test_init_distributed_with_its_arguments():
    """Each rank takes another way to the same group; `start` then uses it and leaves it."""
    source = """
import datetime
import torch.distributed as dist
import zeroxide
rank = int(os.environ["RANK"])
zeroxide.init_distributed(dist_init_required=False)
assert not dist.is_initialized()
if rank == 0:
    zeroxide.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(seconds=30))
elif rank == 1:
    port = int(os.environ.pop("MASTER_PORT"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    zeroxide.init_distributed("gloo", distributed_port=port, timeout=30.0, rank=1, world_size=3)
else:
    url = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    zeroxide.init_distributed("gloo", init_method=url, verbose=False, rank=2, world_size=3)
zeroxide.init_distributed()
from zeroxide.distributed import start
ranks = start()
assert (ranks.rank, ranks.world, ranks.owned) == (rank, 3, False)
ranks.barrier()
ranks.close()
assert dist.is_initialized()
dist.destroy_process_group()
"""
    with Job(3, source, preamble="import os\n", fresh=True) as job:
        for result in job.wait():
            assert result.code == 0, result.err


def test_init_distributed_makes_a_group_of_one_where_nothing_is_set(no_launcher, caplog):
    with caplog.at_level(logging.INFO, logger="zeroxide"):
        init_distributed("gloo")
    try:
        assert dist.get_world_size() == 1
        assert caplog.messages == ["1 ranks over gloo, told by none"]
    finally:
        dist.destroy_process_group()


def test_auto_mpi_discovery_can_be_switched_off(no_launcher, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    with pytest.raises(RanksError, match="SLURM_PROCID: expected 0 to 2"):
        init_distributed("gloo")
    init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    dist.destroy_process_group()


@pytest.mark.parametrize(("rank", "world"), [(0, -1), (-1, 2), (2, 2)])
def test_rank_and_world_size_go_together(rank, world):
    with pytest.raises(RanksError, match="rank"):
        init_distributed("gloo", rank=rank, world_size=world, init_method=f"tcp://127.0.0.1:{free_port()}")


def test_a_collective_that_fails_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("\nConnection closed by peer\nframe #0: c10::Error")

    monkeypatch.setattr(place, "all_gather_single", fail)
    monkeypatch.setattr(dist, "broadcast", fail)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: rank)
    ranks = Ranks(rank=1, world=2, group=object())
    calls = {
        "exchanging objects": lambda: ranks.gather_objects(1),
        "a barrier": ranks.barrier,
        "a broadcast": lambda: ranks.broadcast_tensor(torch.zeros(1)),
    }
    for what, call in calls.items():
        with pytest.raises(RanksError) as caught:
            call()
        assert str(caught.value).startswith(f"rank 1: {what} among 2 ranks failed: Connection closed by peer; another")
    # Once the watch knows why, that is what is said.
    ranks.explain = lambda: RanksError("rank 0 was killed")
    with pytest.raises(RanksError, match=r"^rank 0 was killed$"):
        ranks.barrier()


def test_a_single_rank_answers_itself():
    ranks = Ranks()
    assert ranks.gather_objects((1, "a")) == [[1, "a"]]
    with pytest.raises(ValueError, match="source"):
        ranks.broadcast_tensor(None, 1)
    ranks.close()


def test_ranks_that_may_not_open_one_anothers_memory_say_so():
    # Catches: taking one host for enough; a rank that decides alone would wait for the others' shared memory for ever.
    source = """
    import sys
    starting = sys.modules["zeroxide.distributed.process_group"]
    say(ranks.same_host, ranks.shares_memory)
    if ranks.rank == 1:
        starting._opens = lambda path: False
    again = start()
    say(again.same_host, again.shares_memory)
    """
    results = run_ranks(2, source)
    assert [result.out.split() for result in results] == [["True", "True", "True", "False"]] * 2, results[0].err
