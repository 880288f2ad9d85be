"""Checkpoints under faults: killed at any instant, on a full disk, damaged, forged.

Run as a program, this file is what is killed.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from saving import CALLS, Model, engine_of, state, train

from zeroxide.checkpoint.format import cutting
from zeroxide.errors import CheckpointError, StorageError

# Failing system calls ----------------------------------------------------------------------------------------------


class Calls:
    """Counts the system calls of a save and lets one of them do something else."""

    def __init__(self, patch, act, names=CALLS):
        self.count = 0
        self.act = act
        self.names = []
        for name in names:
            patch(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, real):
        def call(*args, **more):
            flags = args[1] if name == "open" and len(args) > 1 else 0
            # Only what concerns a save: opening for reading changes nothing, but its failure must be survived too.
            self.names.append((name, args[0], flags))
            self.count += 1
            self.act(self.count - 1)
            return real(*args, **more)

        return call


def listing(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("tag", ["new", "old"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_failing_disk_at_every_call(make, tmp_path, monkeypatch, tag, code):
    """Whatever call of a save fails, an earlier checkpoint or the new one loads, and the next save sweeps up."""
    engine, reader = make(), make(seed=7)
    out, backup = tmp_path / "out", tmp_path / "backup"
    train(engine)
    engine.save_checkpoint(backup, "old")
    old = state(engine)
    train(engine)
    new = state(engine)
    at = refusals = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(backup, out)

        def fail(count, at=at):
            if count == at:
                raise OSError(code, os.strerror(code), "somewhere")

        with monkeypatch.context() as patched:
            calls = Calls(patched.setattr, fail)
            try:
                engine.save_checkpoint(out, tag)
            except CheckpointError as error:
                refusals += 1
                line = str(error)
                assert os.strerror(code) in line
                assert "\n" not in line
                if "was not saved" in line and code == errno.ENOSPC:
                    assert "MiB" in line
        assert state(engine) == new
        reader.load_checkpoint(out)
        found = {**state(reader), "rng": 0}
        assert found in ({**old, "rng": 0}, {**new, "rng": 0})
        if calls.count <= at:
            assert found == {**new, "rng": 0}
            break
        at += 1
        # What is left over is swept up by a save that succeeds.
        engine.save_checkpoint(out, "third", save_latest=False)
        assert listing(out) - {"latest"} <= {"old", "new", "third"}
        assert "old" in listing(out)
    assert at > 40
    assert refusals > 30


def test_too_little_room_is_said_before_writing(make, tmp_path, monkeypatch):
    engine = make()
    real = os.statvfs
    small = os.statvfs_result((4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: small if "out" in str(path) else real(path))
    with pytest.raises(CheckpointError, match=r"no room for a checkpoint in .*: it takes 1\.0 MiB, 0\.0 MiB are free"):
        engine.save_checkpoint(tmp_path / "out")
    assert listing(tmp_path / "out") == set()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs privileges")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(make, small_disk, monkeypatch):
    monkeypatch.setattr("zeroxide.checkpoint.save.save._check_room", lambda *args: None)
    engine = make(model=Model(width=250))
    engine.save_checkpoint(small_disk, "one")
    expected = state(engine)
    with pytest.raises(
        CheckpointError, match=r"not saved to .*: No space left on device \(it takes .* MiB\); .*intact"
    ):
        engine.save_checkpoint(small_disk, "two")
    assert listing(small_disk) == {"one", "latest"}
    reader = make(model=Model(width=250), seed=7)
    reader.load_checkpoint(small_disk)
    assert {**state(reader), "rng": 0} == {**expected, "rng": 0}
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 40_000))
    with pytest.raises(StorageError, match=r"the model was not written to .*: No space left on device"):
        engine.save_16bit_model(small_disk)
    assert not [name for name in listing(small_disk) if name.startswith(".")]


def test_a_path_through_a_file_is_refused(make, tmp_path):
    (tmp_path / "file").write_text("")
    engine = make()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"not saved.*leads through a file"):
            engine.save_checkpoint(path)


def test_a_read_only_file_system_is_refused(make, small_disk):
    engine = make()
    engine.save_checkpoint(small_disk, "one")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"two was not saved to .*: Read-only file system at .*intact"):
        engine.save_checkpoint(small_disk, "two")
    with pytest.raises(StorageError, match=r"the model was not written to .*: Read-only file system"):
        engine.save_16bit_model(small_disk)
    engine.load_checkpoint(small_disk)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(make, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match=r"not saved to .*Permission denied"):
        make().save_checkpoint(tmp_path / "out")


def test_everything_is_durable_before_it_is_renamed(make, tmp_path, monkeypatch):
    """The order of system calls that a loss of power needs; a kill alone would not show it."""
    engine = make()
    engine.save_checkpoint(tmp_path / "out", "tag")
    order = []
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def opened(path, flags, *more, **keywords):
        descriptor = real_open(path, flags, *more, **keywords)
        if flags & os.O_CREAT:
            order.append(("create", os.readlink(f"/proc/self/fd/{descriptor}")))
        return descriptor

    def synced(descriptor):
        order.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def renamed(source, target):
        order.append(("rename", str(target)))
        real_rename(source, target)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    engine.save_checkpoint(tmp_path / "out", "tag")
    out = str(tmp_path / "out")
    into_place = order.index(("rename", f"{out}/tag"))
    assert order[into_place - 1] == ("rename", f"{out}/.replaced-tag")
    before, after = order[:into_place], order[into_place + 1 :]
    files = [path for what, path in before if what == "create"]
    assert len(files) == 5
    folder = os.path.dirname(files[0])
    for path in files:
        assert ("sync", path) in before
    assert before.index(("sync", folder)) > max(before.index(("sync", path)) for path in files)
    assert [what for what, _ in after[:5]] == ["sync", "create", "sync", "rename", "sync"]
    assert after[0] == ("sync", out)
    assert after[1][1] == after[2][1]
    assert after[3] == ("rename", f"{out}/latest")
    assert after[4] == ("sync", out)


# Killed ------------------------------------------------------------------------------------------------------------


def killed_saves(out):
    """The program: for each line "<call> <tag>" it forks a process that is killed at that system call of a save.

    Before the fork everything is imported and nothing is computed, so the child is as good as fresh and starts at once.
    """
    torch.set_num_threads(1)
    engine_of().destroy()
    for line in sys.stdin:
        at, tag = line.split()
        child = os.fork()
        if child == 0:
            engine = engine_of()
            train(engine, 2)

            def kill(count, at=int(at)):
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            Calls(setattr, kill)
            engine.save_checkpoint(Path(out), tag)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def endless_saves(out):
    """The program: saves after every step, over one tag and two others in turn, until it is killed."""
    torch.set_num_threads(1)
    engine = engine_of()
    print("ready", flush=True)
    while True:
        train(engine)
        engine.save_checkpoint(Path(out), "same" if engine.global_steps % 2 else None)
        print(engine.global_steps, flush=True)


def program(mode, out):
    return subprocess.Popen(
        [sys.executable, __file__, mode, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("tag", ["new", "old"])
def test_a_save_killed_at_every_call(make, tmp_path, tag):
    engine, reader = make(), make(seed=7)
    out, backup = tmp_path / "out", tmp_path / "backup"
    train(engine)
    engine.save_checkpoint(backup, "old")
    old = {**state(engine), "rng": 0}
    train(engine)
    new = {**state(engine), "rng": 0}
    outcomes = []
    with program("killed", out) as runner:
        for at in range(1000):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(backup, out)
            runner.stdin.write(f"{at} {tag}\n")
            runner.stdin.flush()
            status = int(runner.stdout.readline())
            reader.load_checkpoint(out)
            found = {**state(reader), "rng": 0}
            assert found in (old, new), at
            outcomes.append(found == new)
            left = listing(out)
            if ".replaced-old" in left:
                # It would be loaded if its successor went away, so it is whole as long as it has this name.
                assert listing(out / ".replaced-old") == listing(backup / "old")
            # The next save of anybody leaves nothing of the dead one.
            engine.save_checkpoint(out, "third", save_latest=False)
            assert listing(out) <= {"old", "new", "third", "latest"}, (at, left)
            assert "old" in listing(out)
            reader.load_checkpoint(out)
            assert ({**state(reader), "rng": 0} == new) == outcomes[-1], at
            if status == 0:
                break
            assert status == -signal.SIGKILL
        runner.stdin.close()
    assert len(outcomes) > 40
    # First always the old one, from some call on always the new one.
    assert outcomes == sorted(outcomes)
    assert outcomes[-1]
    assert not outcomes[0]


def test_a_process_killed_at_any_time(make, tmp_path):
    """Five kills by the clock: what was reported as saved is there, whole, each time."""
    reader = make()
    for number in range(5):
        out = tmp_path / f"out{number}"
        with program("endless", out) as runner:
            assert runner.stdout.readline() == "ready\n"
            steps = [runner.stdout.readline() for _ in range(1 + number % 3)]
            time.sleep(0.0023 * number)
            runner.kill()
            steps += runner.stdout.read().split("\n")
        reported = max(int(step) for step in steps if step.strip())
        reader.load_checkpoint(out)
        assert reader.global_steps in (reported, reported + 1)
        train(reader)


def test_what_a_live_save_writes_is_left_alone(make, tmp_path):
    out = tmp_path / "out"
    engine = make()
    engine.save_checkpoint(out, "one")
    (out / ".saving-dead").mkdir()
    (out / ".saving-dead" / "weights-00001.safetensors").write_bytes(b"half")
    (out / ".saving-file").write_text("tw")
    (out / ".saving-live").mkdir()
    descriptor = os.open(out / ".saving-live", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    engine.save_checkpoint(out, "two")
    assert listing(out) == {"one", "two", "latest", ".saving-live"}
    os.close(descriptor)
    engine.save_checkpoint(out, "two")
    assert listing(out) == {"one", "two", "latest"}


def test_a_checkpoint_that_was_moved_aside_is_found(make, tmp_path):
    out = tmp_path / "out"
    engine = make()
    train(engine)
    engine.save_checkpoint(out, "tag")
    expected = {**state(engine), "rng": 0}
    (out / "tag").rename(out / ".replaced-tag")
    reader = make(seed=7)
    reader.load_checkpoint(out)
    assert {**state(reader), "rng": 0} == expected
    # Loading changes nothing; the next save puts it back, and only then removes what has a successor.
    assert listing(out) == {".replaced-tag", "latest"}
    engine.save_checkpoint(out, "other")
    assert listing(out) == {"tag", "other", "latest"}
    shutil.copytree(out / "tag", out / ".replaced-tag")
    engine.save_checkpoint(out, "other")
    assert listing(out) == {"tag", "other", "latest"}


def test_a_file_system_without_locks(make, tmp_path, monkeypatch):
    """Saving works; what another save may still be writing stays."""

    def unsupported(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    out = tmp_path / "out"
    engine = make()
    train(engine)
    engine.save_checkpoint(out, "one")
    (out / ".saving-other").mkdir()
    engine.save_checkpoint(out, "one")
    assert listing(out) == {"one", "latest", ".saving-other"}
    engine.load_checkpoint(out)


def test_an_export_killed_at_every_call_never_mixes(make, tmp_path, monkeypatch):
    """Over an older export of the same shards: the folder holds the old model, the new one, or none that loads."""
    monkeypatch.setattr(cutting, "FILE_BYTES", 200)
    engine = make()
    folder = tmp_path / "model"

    def exported():
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            return None
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [(folder / name).read_bytes() for name in names]

    class Killed(BaseException):
        pass

    train(engine)
    engine.save_16bit_model(folder)
    old = exported()
    train(engine)
    engine.save_16bit_model(tmp_path / "other")
    folder, other = tmp_path / "other", folder
    new = exported()
    folder = other
    assert old != new
    shutil.copytree(folder, tmp_path / "backup")
    seen = []
    for at in range(1000):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "backup", folder)

        def kill(count, at=at):
            if count >= at:
                raise Killed  # nothing after it has an effect either, as the dead do not tidy up

        with monkeypatch.context() as patched:
            calls = Calls(patched.setattr, kill)
            with contextlib.suppress(Killed):
                engine.save_16bit_model(folder)
        seen.append(exported())
        assert seen[-1] in (old, new, None)
        if calls.count <= at:
            break
        engine.save_16bit_model(folder)
        assert exported() == new
        assert not [name for name in listing(folder) if name.startswith(".")]
    assert seen[0] == old
    assert seen[-1] == new
    assert None in seen


if __name__ == "__main__":
    {"killed": killed_saves, "endless": endless_saves}[sys.argv[1]](sys.argv[2])
