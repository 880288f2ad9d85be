"""Ranks that build different models inside `zero.Init`, or are lost there, are named by the others."""

from __future__ import annotations

import pytest
from launching import Job, run_ranks

JOB = """
import signal, threading
from torch import nn
from zeroxide import zero

way = sys.argv[1]
odd = ranks.rank == 1
threading.Thread(target=lambda: (time.sleep(15), say("15 s")), daemon=True).start()

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, 8), nn.Linear(8, width)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for width in self.widths())

    def widths(self):
        yield 4
        if odd and way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if odd and way == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if odd and way == "raise":
            raise ValueError("no such file")
        yield 5 if odd and way == "width" else 4
        if odd and way == "one more":
            yield 4

with zero.Init():
    model = Model()
    if odd and way == "touch":
        nn.init.zeros_(model.blocks[0].a.weight)
say("built")
"""


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("width", ["Block.a.weight float32 [8, 4] on rank 0", "Block.a.weight float32 [8, 5] on rank 1"]),
        ("one more", ["(the list ends before) on rank", "float32 [8, 4] on rank"]),
        ("touch", ["gathering on rank 1", "cutting on rank 0"]),
    ],
)
def test_different_models_are_named_while_they_are_built(way: str, said: list[str]):
    # Catches: values of one parameter broadcast into another; ranks that wait for one another in other collectives.
    for rank, result in enumerate(run_ranks(2, JOB, [way])):
        assert result.code == 1, f"rank {rank}: {result.out}\n{result.err}"
        assert "RanksError: ranks do not agree on model.what zero.Init comes to" in result.err
        assert all(text in result.err for text in said), result.err
        assert "build the same model in the same way on every rank" in result.err
        assert "built" not in result.out


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("kill", "rank 1 was killed or ended without a word"),
        ("stop", "rank 1 is stopped"),
        ("raise", "rank 1 failed while computing construction: ValueError: no such file"),
    ],
)
def test_a_rank_lost_while_models_are_built_is_named(way: str, said: str):
    # Catches: a construction that nobody watches, where the others wait for half an hour.
    with Job(3, JOB, [way], timeout=40.0, fresh=True) as job:
        # A rank that is stopped does not end by itself: the job ends it.
        results = job.wait([0, 2] if way == "stop" else None)
    for rank in (0, 2):
        assert results[rank].code in (1, 75), f"rank {rank}: {results[rank].err}"
        assert said in results[rank].err
        assert "waiting for agreement" in results[rank].err
        assert "15 s" not in results[rank].out
    if way == "raise":
        assert "ValueError: no such file" in results[1].err
