"""Faults of one rank while several save or load: all of them say which, and every earlier checkpoint stays.

The ranks are threads with an engine each, as in the unit tests of checkpoints of several ranks.
"""

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from saving import engine_of, state, train

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from several_ranks import join, on_all, put_together, sharded

from zeroxide.errors import CheckpointError

__all__ = ["sharded"]
pytestmark = pytest.mark.usefixtures("sharded")
CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")


@pytest.fixture
def pair(make):
    engines = [make() for _ in range(2)]
    for engine in engines:
        train(engine)
    return join(engines)


def save(engines, folder, tag):
    return on_all(engines, lambda engine: engine.save_checkpoint(folder, tag), errors=True)


def listing(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_at_every_call_of_one_rank(pair, make, tmp_path, monkeypatch, failing):
    out = tmp_path / "out"
    save(pair, out, "old")
    old = put_together(pair)
    for engine in pair:
        train(engine)
    new = put_together(pair)
    thread = {}
    at = refusals = 0
    while True:
        left = iter(range(at))

        def failing_call(real, left=left):
            def call(*args, **more):
                if threading.current_thread() is thread.get(failing) and next(left, None) is None:
                    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
                return real(*args, **more)

            return call

        def act(engine):
            thread[engine.fake.rank] = threading.current_thread()
            return engine.save_checkpoint(out, "new")

        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, failing_call(getattr(os, name)))
            errors = on_all(pair, act, errors=True)
        thread.clear()
        reader = make(seed=7)
        reader.load_checkpoint(out)
        found = put_together([reader])
        reader.destroy()
        whole = [all(found[key].equal(values) for key, values in each.items()) for each in (old, new)]
        assert any(whole), at
        if next(left, None) is not None:
            assert whole[1]
            break
        if isinstance(errors[0], CheckpointError):
            refusals += 1
            assert str(errors[0]) == str(errors[1])
            assert f"rank {failing}: " in str(errors[0])
            assert "No space left on device" in str(errors[0])
        else:
            assert not any(isinstance(error, BaseException) for error in errors)
        # Neither is there half of a checkpoint, nor will there be.
        save(pair, out, "third")
        assert listing(out) <= {"old", "new", "third", "latest"}
        (out / "latest").write_text("old\n")
        at += 1
    assert refusals > (20 if failing == 0 else 8)


DAMAGE = {
    "flipped": (lambda data: data[:-1] + bytes([data[-1] ^ 4]), "is damaged: its checksum should be"),
    "truncated": (lambda data: data[:-5], "is damaged: it should have"),
    "missing": (None, "is missing"),
    "pickle": (lambda data: (pickle.dumps(Path("x")) + bytes(len(data)))[: len(data)], "is a Python pickle"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_damage_in_the_file_of_any_rank_is_named_by_all(pair, make, tmp_path, kind, world):
    save(pair, tmp_path / "out", "tag")
    change, line = DAMAGE[kind]
    engines = join([make(seed=7) for _ in range(world)])
    before = [state(engine) for engine in engines]
    for file in sorted((tmp_path / "out" / "tag").glob("*.safetensors")):
        data = file.read_bytes()
        if change is None:
            file.unlink()
        else:
            file.write_bytes(change(data))
        errors = on_all(engines, lambda engine: engine.load_checkpoint(tmp_path / "out"), errors=True)
        assert {type(error) for error in errors} == {CheckpointError}
        assert len({str(error) for error in errors}) == 1
        assert file.name in str(errors[0])
        assert line in str(errors[0])
        file.write_bytes(data)
    assert [state(engine) for engine in engines] == before
    on_all(engines, lambda engine: engine.load_checkpoint(tmp_path / "out"))


def test_a_newer_version_is_refused_by_all(pair, tmp_path):
    from zeroxide.checkpoint.format import manifest

    path = save(pair, tmp_path / "out", "tag")[0]
    body = json.loads((path / "manifest.json").read_text())
    del body["digest"]
    body["version"] = 99
    body["digest"] = manifest._digest_of(body)
    (path / "manifest.json").write_text(json.dumps(body))
    errors = on_all(pair, lambda engine: engine.load_checkpoint(tmp_path / "out"), errors=True)
    assert [str(error) for error in errors] == [str(errors[0])] * 2
    assert "has version 99, this zeroxide reads up to 5" in str(errors[0])


BACKGROUND = """
import sys, time, os, signal
sys.path[:0] = sys.argv[2:]
from saving import engine_of, train
from zeroxide.checkpoint.format import stream
engine = engine_of(config={"zeroxide": {"checkpoint_background": True}})
train(engine)
engine.save_checkpoint(sys.argv[1], "one")
engine.wait_for_checkpoint()
train(engine)
finish = stream.StreamWriter.finish
def killed(writer):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
stream.StreamWriter.finish = killed
engine.save_checkpoint(sys.argv[1], "two")
train(engine, 100)
time.sleep(60)
"""


def test_sigterm_during_a_save_in_the_background_leaves_the_one_before(make, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", BACKGROUND, str(out), str(Path(__file__).parent)], timeout=120, check=False
    )
    assert done.returncode == -15
    assert "two" not in listing(out)
    reader = make(seed=7)
    reader.load_checkpoint(out)
    assert reader.global_steps == 1
    # What it left is swept up by the next save.
    assert len(listing(out)) == 3
    reader.save_checkpoint(out, "three")
    assert listing(out) == {"one", "three", "latest"}


def test_a_program_that_ends_without_waiting_still_has_its_checkpoint(make, tmp_path):
    out = tmp_path / "out"
    source = BACKGROUND.split("engine.wait_for")[0]
    subprocess.run([sys.executable, "-c", source, str(out), str(Path(__file__).parent)], timeout=120, check=True)
    expected = engine_of()
    train(expected)
    reader = make(seed=7)
    reader.load_checkpoint(out)
    found = state(reader)
    expected_state = state(expected)
    expected.destroy()
    assert {**found, "rng": 0} == {**expected_state, "rng": 0}
