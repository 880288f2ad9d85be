"""Which steps of a run are traced, and that a trace that cannot be had costs no run."""

import contextlib
import errno

import pytest

from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.tracing import Tracing
from zeroxide.errors import BudgetError, StorageError


class Engine:
    """Counts what is recorded, and writes the file at the end."""

    def __init__(self, refused=None, failed=None):
        self.refused, self.failed = refused, failed
        self.entered = self.left = 0
        self.heard = []
        self.forgotten = []

    @contextlib.contextmanager
    def trace(self, path):
        if self.refused is not None:
            raise self.refused
        self.entered += 1
        try:
            yield self
        except BaseException as error:
            self.heard.append(error)
            raise
        finally:
            self.left += 1
            path.write_text("{}")
        if self.failed is not None:
            raise self.failed

    def forget_before(self, moment):
        self.forgotten.append(moment)


def run(engine, path, trace, steps, start=0, fails_after=None):
    said, done = [], []
    options = TrainOptions(trace=trace, steps=steps)
    with Tracing(engine, path, options, said.append, lambda first, last: done.append((first, last))) as tracing:
        for step in range(start + 1, steps + 1):
            tracing.before_step(step)
            if step == fails_after:
                raise KeyboardInterrupt
            tracing.after_step(step)
    return said, done


@pytest.mark.parametrize(
    ("trace", "steps", "start", "expected"),
    [
        (None, 5, 0, [(4, 5)]),
        (None, 1, 0, [(1, 1)]),
        (None, 9, 8, [(9, 9)]),
        ("2:3", 5, 0, [(2, 3)]),
        ("2:2", 5, 0, [(2, 2)]),
        ("4:9", 5, 0, [(4, 5)]),
        ("2:5", 6, 3, [(4, 5)]),
        ("none", 5, 0, []),
    ],
)
def test_the_steps_that_are_asked_for_or_the_newest_two(tmp_path, trace, steps, start, expected):
    engine = Engine()
    said, done = run(engine, tmp_path / "trace.json", trace, steps, start)
    assert (said, done) == ([], expected)
    assert engine.entered == engine.left == len(expected)
    if trace is None and steps - start > 2:
        # As each step begins, what came before the last one is forgotten: with the first two nothing more.
        first, second, *later = engine.forgotten
        assert first == second < later[0] < later[1]


def test_steps_that_are_over_are_said_once(tmp_path):
    engine = Engine()
    said, done = run(engine, tmp_path / "trace.json", "2:3", 9, start=5)
    assert said == ["no trace of steps 2 to 3: the run goes on after step 5"]
    assert done == []
    assert engine.entered == 0


def test_after_the_steps_nothing_is_said(tmp_path):
    said, _ = run(Engine(), tmp_path / "trace.json", "2:3", 9)
    assert said == []


@pytest.mark.parametrize(
    "refused", [BudgetError("no room for the recorder"), StorageError("cannot write the trace to x", path="x")]
)
def test_a_trace_that_is_refused_costs_no_run(tmp_path, refused):
    said, done = run(Engine(refused=refused), tmp_path / "trace.json", None, 4)
    assert said == [f"no trace of this run: {refused.message}"]
    assert done == []


def test_a_file_that_cannot_be_written_costs_no_run_and_a_step_that_fails_does(tmp_path):
    path = tmp_path / "trace.json"
    said, done = run(Engine(failed=StorageError("disk full", path=path, errno=errno.ENOSPC)), path, None, 4)
    assert said == ["no trace of this run: disk full"]
    assert done == []
    with pytest.raises(StorageError, match="scratch"):
        run(Engine(failed=StorageError("scratch is gone", path=tmp_path / "scratch")), path, None, 4)


def test_what_ends_the_run_reaches_the_trace_and_the_run(tmp_path):
    engine = Engine()
    with pytest.raises(KeyboardInterrupt):
        run(engine, tmp_path / "trace.json", None, 9, fails_after=5)
    assert [type(error) for error in engine.heard] == [KeyboardInterrupt]
