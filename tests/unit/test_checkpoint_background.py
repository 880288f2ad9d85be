"""Saving while training goes on: the bits of the moment of the save, bounded memory, and no failure lost."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from checkpointing import Model, assemble, assert_same, freeze, state, train
from several_ranks import join, on_all, put_together

import zeroxide
from zeroxide.checkpoint import contents, live_state
from zeroxide.checkpoint.format import cutting
from zeroxide.checkpoint.format.durable_file import WRITE_MEMORY
from zeroxide.checkpoint.save import snapshot
from zeroxide.checkpoint.save.snapshot import Slabs, SnapshotEnded
from zeroxide.errors import CheckpointError

HOMES = [("none", "fp32"), ("none", "split"), ("cpu", "split"), ("nvme", "fp32"), ("nvme", "split")]
LARGE = {"tied": False, "vocabulary": 20_000}


@pytest.fixture
def background(make):
    """Makes engines that save in the background."""

    def build(*args, memory=None, **more):
        section = {"checkpoint_background": True, **({} if memory is None else {"checkpoint_memory": memory})}
        section.update(more.pop("zeroxide_config", {}))
        return make(*args, zeroxide_config=section, **more)

    return build


class Gate:
    """Holds the writer of every save up until it is opened."""

    def __init__(self, monkeypatch, after=0):
        from zeroxide.checkpoint.format import stream

        self.opened = threading.Event()
        self.left = after
        real = stream.StreamWriter.write

        def write(writer, values):
            if self.left:
                self.left -= 1
            else:
                assert self.opened.wait(60)
            real(writer, values)

        monkeypatch.setattr(stream.StreamWriter, "write", write)


@pytest.mark.parametrize("home", HOMES, ids="-".join)
def test_what_is_saved_is_the_state_of_that_moment(background, make, tmp_path, monkeypatch, home):
    """Two steps are done, with the writer held up all the while, before a byte of the state is in a file."""
    gate = Gate(monkeypatch)
    saver = background(*home, model=freeze(Model()))
    train(saver, 0, 2)
    expected = state(saver)
    path = saver.save_checkpoint(tmp_path / "out", client_state={"step": 2})
    assert path == tmp_path / "out" / "global_step2"
    losses = train(saver, 2, 4)
    assert not path.exists()
    gate.opened.set()
    assert saver.wait_for_checkpoint() == path
    assert saver.wait_for_checkpoint() is None
    loader = make(*home, model=freeze(Model()), seed=7)
    assert loader.load_checkpoint(tmp_path / "out")[1] == {"step": 2}
    assert_same(state(loader), expected)
    assert train(loader, 2, 4) == losses


def test_the_files_are_those_of_a_save_in_the_foreground(background, make, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "FILE_BYTES", 20_000)
    ahead, plain = background("nvme", "split", model=freeze(Model())), make("nvme", "split", model=freeze(Model()))
    for engine, name in ((ahead, "ahead"), (plain, "plain")):
        train(engine, 0, 2)
        torch.manual_seed(3)
        engine.save_checkpoint(tmp_path / name, "tag")
    ahead.wait_for_checkpoint()
    files = sorted(file.name for file in (tmp_path / "plain" / "tag").iterdir())
    assert sorted(file.name for file in (tmp_path / "ahead" / "tag").iterdir()) == files
    for name in files:
        assert (tmp_path / "ahead" / "tag" / name).read_bytes() == (tmp_path / "plain" / "tag" / name).read_bytes(), (
            name
        )


@pytest.mark.parametrize("home", [("none", "split"), ("nvme", "split")], ids="-".join)
def test_too_little_memory_makes_the_update_wait_and_not_the_forward(background, make, tmp_path, monkeypatch, home):
    monkeypatch.setattr(live_state, "CHUNK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(live_state.Staging.__init__, "__defaults__", (1 << 16,))
    monkeypatch.setattr("zeroxide.checkpoint.save.background.CHUNK_BYTES", 4 << 16)
    gate = Gate(monkeypatch, after=3)
    saver = background(*home, memory=1 << 20, model=Model(**LARGE))
    train(saver, 0, 1)
    expected = state(saver)
    saver.save_checkpoint(tmp_path / "out")
    x = torch.zeros(2, 8, dtype=torch.long)
    saver.backward(saver(x))
    assert saver.checkpoint_stats()["under_way"]
    stepping = threading.Thread(target=saver.step)
    stepping.start()
    stepping.join(0.3)
    assert stepping.is_alive()
    assert saver.global_steps == 1
    gate.opened.set()
    stepping.join(60)
    assert saver.global_steps == 2
    saver.wait_for_checkpoint()
    found = saver.checkpoint_stats()
    assert found["seconds_stopped"] > 0
    assert 0 < found["memory_peak"] <= 1 << 20
    assert found["bytes"] > 10 * found["memory_peak"]
    assert found["memory"] == 0
    assert not found["under_way"]
    loader = make(*home, model=Model(**LARGE), seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), expected)


def test_with_enough_memory_no_step_waits_for_the_writer(background, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = background(model=Model(**LARGE))
    saver.save_checkpoint(tmp_path / "out")
    train(saver, 0, 3)
    found = saver.checkpoint_stats()
    assert found["under_way"]
    size = sum(param.numel for param in contents.param_records(saver.training_state)) * 12
    # What is small shares slabs, and the last slab is not full.
    assert found["memory"] <= size + 2 * snapshot.SLAB_BYTES
    gate.opened.set()
    saver.wait_for_checkpoint()
    assert saver.checkpoint_stats()["memory"] == 0
    assert saver.checkpoint_stats()["saves"] == 1


def slow_down(monkeypatch):
    """Has a save rest for minutes after whatever it does while nobody waits for it."""
    monkeypatch.setattr("zeroxide.checkpoint.save.pace.SHARE", 1e-9)
    monkeypatch.setattr("zeroxide.checkpoint.save.pace.LEAST_SECONDS", 0)


def test_a_save_rests_until_somebody_waits_for_it(background, make, tmp_path, monkeypatch):
    """Catches: a writer that takes whole cores from training, one that rests while it is waited for, and capturing that
    rests although the next update waits for it."""
    slow_down(monkeypatch)
    saver = background("none", "split")
    train(saver, 0, 1)
    expected = state(saver)
    saver.save_checkpoint(tmp_path / "out")
    train(saver, 1, 3)
    time.sleep(0.3)
    assert saver.checkpoint_stats()["under_way"]
    saver.wait_for_checkpoint()
    loader = make("none", "split", seed=7)
    loader.load_checkpoint(tmp_path / "out")
    assert_same(state(loader), expected)


def test_a_save_that_nobody_concludes_does_not_keep_the_program(tmp_path):
    """Nobody waits in the program, whose end does."""
    program = (
        "import sys, torch, zeroxide\n"
        "from zeroxide.checkpoint.save import pace\n"
        "pace.SHARE, pace.LEAST_SECONDS = 1e-4, 0\n"
        "model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))\n"
        "config = {'zeroxide': {'checkpoint_background': True}}\n"
        "engine, *_ = zeroxide.initialize(model=model, lr=1e-2, config=config)\n"
        "engine.save_checkpoint(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=True, timeout=60)
    assert (tmp_path / "out" / "global_step0" / "manifest.json").exists()


def test_the_budget_of_the_process_bounds_the_snapshot(background, tmp_path, monkeypatch):
    from zeroxide import _core

    saver = background(host_memory="64GiB", model=Model(**LARGE))
    gate = Gate(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(_core, "resident", lambda: {"peak": (64 << 30) - (17 << 20), "rss": 0})
        saver.save_checkpoint(tmp_path / "out")
    # Nothing is written meanwhile: as much waits as may.
    time.sleep(0.3)
    gate.opened.set()
    saver.wait_for_checkpoint()
    found = saver.checkpoint_stats()
    assert 0 < found["memory_peak"] + WRITE_MEMORY <= 17 << 20
    assert found["bytes"] > 14 << 20


def test_buffers_are_those_of_the_moment(background, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = background()
    train(saver, 0, 2)
    saver.save_checkpoint(tmp_path / "out")
    train(saver, 2, 5)
    gate.opened.set()
    path = saver.wait_for_checkpoint()
    assert assemble(path, "buffers")["seen.num_batches_tracked"].item() == 2
    assert saver.module.seen.num_batches_tracked.item() == 5


@pytest.mark.parametrize("act", ["save", "load", "destroy", "wait"])
def test_whatever_needs_the_end_of_a_save_waits_for_it(background, tmp_path, monkeypatch, act):
    gate = Gate(monkeypatch)
    saver = background()
    train(saver, 0, 1)
    path = saver.save_checkpoint(tmp_path / "out", "one")
    acts = {
        "save": lambda: saver.save_checkpoint(tmp_path / "out", "two"),
        "load": lambda: saver.load_checkpoint(tmp_path / "out", "one"),
        "destroy": saver.destroy,
        "wait": saver.wait_for_checkpoint,
    }
    done = threading.Thread(target=acts[act])
    done.start()
    done.join(0.2)
    assert done.is_alive()
    assert not path.exists()
    gate.opened.set()
    done.join(60)
    assert path.exists()
    assert (tmp_path / "out" / "latest").read_text() in ("one\n", "two\n")


@pytest.mark.parametrize("act", ["save", "load", "destroy", "wait"])
def test_a_failure_is_raised_at_the_next_chance_and_once(background, make, tmp_path, monkeypatch, caplog, act):
    from zeroxide.checkpoint.format import stream

    saver = background(model=Model(**LARGE))
    saver.save_checkpoint(tmp_path / "out", "one")
    saver.wait_for_checkpoint()

    def full(writer, values):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stream.StreamWriter, "write", full)
        saver.save_checkpoint(tmp_path / "out", "two")
        # Training goes on, also over updates.
        train(saver, 0, 2)
        while saver.checkpoint_stats()["under_way"]:
            time.sleep(0.01)
    acts = {
        "save": lambda: saver.save_checkpoint(tmp_path / "out", "three"),
        "load": lambda: saver.load_checkpoint(tmp_path / "out"),
        "destroy": saver.destroy,
        "wait": saver.wait_for_checkpoint,
    }
    with pytest.raises(CheckpointError, match=r"two was not saved to .*No space left on device.*intact") as caught:
        acts[act]()
    assert "\n" not in str(caught.value)
    assert str(caught.value) in caplog.text
    acts[act]()
    saver.destroy()
    third = {"three"} if act == "save" else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one", "latest"} | third


def test_what_can_be_known_beforehand_is_raised_at_once(background, tmp_path):
    saver = background()
    with pytest.raises(CheckpointError, match="client_state"):
        saver.save_checkpoint(tmp_path / "out", client_state={"a": object()})
    with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
        saver.save_checkpoint(tmp_path / "out", "a/b")
    assert saver.wait_for_checkpoint() is None
    assert not (tmp_path / "out").exists()


def test_no_thread_is_left(background, tmp_path):
    before = set(threading.enumerate())
    saver = background()
    saver.save_checkpoint(tmp_path / "out")
    saver.destroy()
    assert set(threading.enumerate()) <= before


def test_an_engine_that_is_dropped_still_finishes_its_save(background, make, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    torch.manual_seed(0)
    engine, *_ = zeroxide.initialize(
        model=Model(), lr=1e-2, dtype="bf16", config={"checkpoint": {"writer": {"decoupled": True}}}
    )
    expected = put_together([engine])
    engine.save_checkpoint(tmp_path / "out")
    threads = [each for each in threading.enumerate() if each.name == "zeroxide-save"]
    del engine
    gate.opened.set()
    for each in threads:
        each.join(60)
    loader = make(seed=7)
    loader.load_checkpoint(tmp_path / "out")
    found = put_together([loader])
    assert all(found[key].equal(values) for key, values in expected.items())


# Several ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(background, sharded):
    engines = [background() for _ in range(2)]
    for engine in engines:
        train(engine, 0, 1)
    return join(engines)


def test_ranks_save_in_the_background_without_meeting(pair, make, tmp_path):
    expected = put_together(pair)
    on_all(pair, lambda engine: engine.save_checkpoint(tmp_path / "out"))
    path = tmp_path / "out" / "global_step1"
    meeting = pair[0].fake._meeting
    pair[0].fake._meeting = pair[1].fake._meeting = None
    for engine in pair:
        train(engine, 1, 3)
    for _ in range(3000):
        if path.exists():
            break
        time.sleep(0.01)
    pair[0].fake._meeting = pair[1].fake._meeting = meeting
    assert on_all(pair, lambda engine: engine.wait_for_checkpoint()) == [path] * 2
    assert not [file for file in path.iterdir() if file.name.startswith(".")]
    loader = make(seed=7)
    loader.load_checkpoint(tmp_path / "out")
    found = put_together([loader])
    assert all(found[key].equal(values) for key, values in expected.items())


@pytest.mark.parametrize("silent", [False, True], ids=["says so", "cannot even say so"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_fails_all_when_they_meet(pair, tmp_path, monkeypatch, failing, silent):
    from zeroxide.checkpoint.save import background, save

    on_all(pair, lambda engine: engine.save_checkpoint(tmp_path / "out", "one"))
    on_all(pair, lambda engine: engine.wait_for_checkpoint())
    real = save.Save._write_files

    def write(self, values):
        if self.team.rank == failing:
            raise OSError(28, "No space left on device")
        return real(self, values)

    def leave(self, report):
        if self._save.team.rank == failing:
            raise OSError(5, "Input/output error")
        return real_leave(self, report)

    monkeypatch.setattr(save.Save, "_write_files", write)
    real_leave = background.BackgroundSave._leave
    if silent:
        monkeypatch.setattr(background.BackgroundSave, "_leave", leave)
    on_all(pair, lambda engine: engine.save_checkpoint(tmp_path / "out", "two"))
    for engine in pair:
        train(engine, 1, 2)
    errors = on_all(pair, lambda engine: engine.wait_for_checkpoint(), errors=True)
    lines = [str(error) for error in errors]
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"rank {failing}: checkpoint two was not saved to ")
    assert "No space left on device" in lines[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one", "latest"}


def test_a_rank_that_is_destroyed_alone_waits_for_no_meeting(pair, tmp_path, monkeypatch):
    from zeroxide.checkpoint.save import background, save

    monkeypatch.setattr(background, "PATIENCE_SECONDS", 0.2)
    gone = threading.Event()
    real = save.Save._write_files

    def write(self, values):
        if self.team.rank == 1:
            assert gone.wait(60)
        return real(self, values)

    monkeypatch.setattr(save.Save, "_write_files", write)
    on_all(pair, lambda engine: engine.save_checkpoint(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="rank 1 ended before its part was written"):
        pair[0].destroy()
    gone.set()
    with pytest.raises(CheckpointError, match="was not saved"):
        pair[1].destroy()
    assert not any((tmp_path / "out").iterdir())


# Memory ------------------------------------------------------------------------------------------------------------


def test_slabs_keep_to_their_limit_and_are_used_again():
    slabs = Slabs(1 << 20, 1 << 17)
    waiting = []
    taken = 0

    def take():
        nonlocal taken
        for number in range(100):
            slab, memory = slabs.take(1 << 17)
            memory.fill_(number)
            waiting.append((slab, memory, number))
            taken += 1

    thread = threading.Thread(target=take)
    thread.start()
    deadline = time.monotonic() + 60
    given = 0
    while given < 100 and time.monotonic() < deadline:
        if not waiting:
            time.sleep(0.001)
            continue
        slab, memory, number = waiting.pop(0)
        assert (memory == number).all()
        assert slabs.held <= 1 << 20
        slabs.give_back(slab)
        given += 1
    thread.join()
    assert given == taken == 100
    slabs.no_more()
    assert slabs.held == 0
    assert 0 < slabs.peak <= 1 << 20


def test_nobody_waits_for_a_writer_that_has_failed():
    slabs = Slabs(0, 1000)
    taken = [slabs.take(1000) for _ in range(2)]
    assert len({slab for slab, _ in taken}) == 2
    failures = []

    def take():
        try:
            slabs.take(1000)
        except SnapshotEnded:
            failures.append(True)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    slabs.end()
    thread.join(60)
    assert failures == [True]
