"""Several ranks in one process: a thread each, and engines that each save and load their part of the elements."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from zeroxide.checkpoint import agree, contents
from zeroxide.checkpoint.convert import export
from zeroxide.checkpoint.load import load
from zeroxide.checkpoint.save import description, save
from zeroxide.device.placement import spec
from zeroxide.distributed import Ranks

PARTS = ("weights", "exp_avg", "exp_avg_sq")
SECONDS = 60
"""After which a rank that waits for another one gives up."""


class OneOfSeveral(Ranks):
    """A single rank as training sees it, which checkpoints take for `fake`."""

    fake = None


class Meeting:
    """Where the ranks of one world meet."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world)
        self.found = [None] * world


class FakeRanks:
    """What is asked of an engine's ranks, between threads."""

    def __init__(self, rank, meeting):
        self.rank = rank
        self.world = meeting.barrier.parties
        self.local_world = self.world
        self.alone = self.world == 1
        self._meeting = meeting

    def barrier(self):
        self._meeting.barrier.wait(SECONDS)

    def gather_objects(self, obj):
        self._meeting.found[self.rank] = json.dumps(obj)
        self.barrier()
        found = [json.loads(each) for each in self._meeting.found]
        self.barrier()
        return found


def run_on(held, rank, world):
    """The runs of elements in slice `rank` of each unit's parameters laid end to end, trainable and frozen apart."""
    found = []
    for unit in sorted({each.unit for each in held}):
        for trainable in (True, False):
            members = [each for each in held if each.unit == unit and each.trainable is trainable]
            share = -(-sum(each.numel for each in members) // world)
            begin, end, at = rank * share, (rank + 1) * share, 0
            for each in members:
                low, high = max(begin - at, 0), min(end - at, each.numel)
                if low < high:
                    found.append(contents.ElementRange(each, low, high - low))
                at += each.numel
    return found


@pytest.fixture
def sharded(monkeypatch):
    """Lets every engine that has joined others save and load with them, and own its slice of each unit only."""
    for module in (save, load, export):
        monkeypatch.setattr(module, "Team", lambda ranks: agree.Team(getattr(ranks, "fake", None) or ranks))

    real = contents.own_pieces

    def own(training, held):
        fake = getattr(training.ranks, "fake", None)
        return real(training, held) if fake is None else run_on(held, fake.rank, fake.world)

    for module in (description, export):
        monkeypatch.setattr(module, "own_pieces", own, raising=False)
    monkeypatch.setattr(load, "pieces_to_fill", lambda training, held, part: own(training, held))


def join(engines):
    """Makes engines the ranks of one world."""
    meeting = Meeting(len(engines))
    for rank, engine in enumerate(engines):
        # Training goes by the engine's own ranks, of which there is one.
        engine.parts.ranks = OneOfSeveral()
        engine.parts.job = replace(engine.parts.job, world=engine.parts.ranks, ranks=engine.parts.ranks)
        engine.fake = engine.parts.ranks.fake = FakeRanks(rank, meeting)
    return engines


def on_all(engines, act, *, errors=False):
    """`act(engine)` on all ranks at once; with `errors`, what each raised instead of raising it."""

    def one(engine):
        torch.set_num_threads(1)
        try:
            return act(engine)
        except BaseException as error:
            if not errors:
                raise
            return error

    with ThreadPoolExecutor(len(engines)) as pool:
        return [each.result(SECONDS) for each in [pool.submit(one, engine) for engine in engines]]


def own_state(engine):
    """Every bit of the state that this rank owns, by (name, part, start)."""
    found = {}
    fake = getattr(engine.parts.ranks, "fake", None) or Ranks()
    for run in run_on(contents.param_records(engine.training_state), fake.rank, fake.world):
        for part in PARTS:
            values = torch.empty(run.count)
            engine.parts.core().read_param(run.held.unit, run.held.position, part, run.start, spec(values))
            found[run.held.name, part, run.start] = values.view(torch.int32)
    return found


def put_together(engines):
    """The state of all ranks by (name, part), every element once."""
    found = {}
    for engine in engines:
        for (name, part, start), values in own_state(engine).items():
            found.setdefault((name, part), []).append((start, values))
    return {
        key: torch.cat([values for _, values in sorted(pieces, key=lambda each: each[0])])
        for key, pieces in found.items()
    }
