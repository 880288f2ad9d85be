"""Checkpoints under faults: killed at any instant, on a full disk, damaged, forged.

Run as a program, this file is what is killed.
"""

import contextlib
import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.checkpoint import cutting, manifest
from zeroxide.errors import CheckpointError, StorageError
from zeroxide.zero.tensors import spec

PARTS = ("weights", "exp_avg", "exp_avg_sq")
CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")
"""Every system call by which a save changes something."""


class Model(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.items = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.norm = nn.BatchNorm1d(width, affine=False)

    def forward(self, x):
        for item in self.items:
            x = item(x).tanh()
        return self.norm(x).square().sum() + x.sum()


def engine_of(offload="none", seed=0, **more):
    torch.manual_seed(seed)
    model = more.pop("model", None) or Model()
    return zeroxide.initialize(model=model, lr=1e-2, offload=offload, dtype="bf16", **more)[0]


def train(engine, steps=1):
    for _ in range(steps):
        x = torch.rand(4, 8, generator=torch.Generator().manual_seed(engine.global_steps)).bfloat16()
        engine.backward(engine(x))
        engine.step()


def state(engine):
    found = {}
    core = engine._alive()
    for unit in engine._units:
        for at, name in enumerate(unit.names):
            for part in PARTS:
                values = torch.empty(unit.shapes[at].numel())
                core.read_param(unit.index, at, part, 0, spec(values))
                found[name, part] = values.tolist()
            found[name, "updates"] = core.updates(unit.index, at)
    for name, buffer in engine.module.named_buffers():
        found[name] = buffer.tolist()
    found["steps"] = engine.global_steps
    found["rng"] = torch.get_rng_state().tolist()
    found["groups"] = engine.optimizer.hyperparameters()
    if engine.lr_scheduler is not None:
        found["schedule"] = engine.lr_scheduler.state_dict()
    return found


@pytest.fixture
def make(tmp_path):
    made = []

    def build(*args, **more):
        made.append(engine_of(*args, **more))
        return made[-1]

    yield build
    for engine in made:
        engine.destroy()


@pytest.fixture
def saved(make, tmp_path):
    """An engine, and the path of a checkpoint of it after three steps."""
    engine = make()
    train(engine, 3)
    return engine, engine.save_checkpoint(tmp_path / "out", client_state={"epoch": 1})


def refused(engine, folder, **more):
    """The one line with which loading is refused; the engine is as before."""
    before = state(engine)
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, **more)
    assert state(engine) == before
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line or Path(str(caught.value.path)).is_relative_to(folder)
    return line


# Damage ------------------------------------------------------------------------------------------------------------

FILES = ["weights-00001.safetensors", "exp_avg-00001.safetensors", "exp_avg_sq-00001.safetensors"]
FILES.append("buffers-00001.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(make, tmp_path, saved, name):
    _, path = saved
    engine = make(seed=7)
    whole = (path / name).read_bytes()
    lines = set()
    for at in [*range(8), *range(8, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        (path / name).write_bytes(damaged)
        lines.add(refused(engine, tmp_path / "out").partition(" and is ")[0])
    assert len(lines) == 1
    assert f"{name} is damaged: its checksum should be" in lines.pop()
    for end in (0, 1, 7, 8, 9, 100, len(whole) - 1):
        (path / name).write_bytes(whole[:end])
        line = refused(engine, tmp_path / "out")
        assert f"{name} is damaged: it should have {len(whole)} bytes and has {end}" in line
    (path / name).write_bytes(whole + b"\0")
    assert f"has {len(whole) + 1}" in refused(engine, tmp_path / "out")
    (path / name).unlink()
    assert f"{name} is missing" in refused(engine, tmp_path / "out")
    (path / name).mkdir()
    assert f"{name} is damaged" in refused(engine, tmp_path / "out")
    (path / name).rmdir()
    (path / name).write_bytes(whole)
    engine.load_checkpoint(tmp_path / "out")


def test_a_damaged_manifest_is_refused(make, tmp_path, saved):
    _, path = saved
    engine = make(seed=7)
    file = path / "manifest.json"
    whole = file.read_bytes()
    expected = json.loads(whole)
    for at in range(0, len(whole), max(1, len(whole) // 600)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 7)
        try:
            if json.loads(damaged) == expected:
                continue  # white space
        except ValueError:
            pass
        file.write_bytes(damaged)
        assert "manifest.json" in refused(engine, tmp_path / "out"), at
    for end in (0, 1, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole[:end])
        assert "is damaged" in refused(engine, tmp_path / "out")
    file.unlink()
    assert "is not a zeroxide checkpoint: it has no manifest.json" in refused(engine, tmp_path / "out")


def rewrite(path, change):
    """Changes a manifest so that its own checksum fits again."""
    body = json.loads((path / "manifest.json").read_text())
    del body["digest"]
    change(body)
    body["digest"] = manifest._digest_of(body)
    (path / "manifest.json").write_text(json.dumps(body))


def set_first(body, *keys, value):
    for key in keys[:-1]:
        body = body[key]
    body[keys[-1]] = value


FORGED = [
    (("version",), 2, "has version 2, this zeroxide reads up to 1: load it with zeroxide"),
    (("version",), 0, "is not well-formed at version"),
    (("version",), "1", "is not well-formed at version"),
    (("format",), "other", '"format" is not "zeroxide-checkpoint"'),
    (("counters", "global_steps"), -1, "is not well-formed at counters.global_steps"),
    (("counters", "global_steps"), "3", "is not well-formed at counters.global_steps"),
    (("more",), 1, "is not well-formed at more"),
    (("files", 0, "name"), "../../secret", "'../../secret' is not the name of a file in the checkpoint"),
    (("files", 0, "name"), "other", "weights of items.0.weight is not complete"),
    (("parameters", 0, "weights", 0, "start"), 1, "weights of items.0.weight is not complete"),
    (("parameters", 0, "weights", 0, "count"), 63, "weights of items.0.weight is not complete"),
    (("parameters", 0, "weights", 0, "key"), "items.0.bias", "does not hold items.0.bias as F32 of 64 elements"),
    (("parameters", 0, "weights", 0, "dtype"), "BF16", "does not hold items.0.weight as BF16"),
    (("parameters", 0, "weights", 0, "dtype"), "F4", "unknown dtype 'F4'"),
    (("parameters", 0, "names"), ["items.1.weight"], "two parameters are called items.1.weight"),
    (("client_state",), [1], "client_state is no dict"),
    (("generators", "torch"), "AAAA", "is not well-formed"),
    (("generators",), {}, "is not well-formed"),
    (("files", 0, "bytes"), 1 << 40, "is damaged: it should have 1099511627776 bytes"),
]


@pytest.mark.parametrize(("keys", "value", "line"), FORGED, ids=[".".join(map(str, each[0])) for each in FORGED])
def test_manifests_that_do_not_fit_are_refused(make, tmp_path, saved, keys, value, line):
    _, path = saved
    rewrite(path, lambda body: set_first(body, *keys, value=value))
    assert line in refused(make(seed=7), tmp_path / "out")


def test_a_schedule_state_that_does_not_fit_changes_nothing(make, tmp_path):
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-2}}}
    saver = make(config=schedule)
    train(saver, 2)
    path = saver.save_checkpoint(tmp_path / "out")
    rewrite(path, lambda body: set_first(body, "scheduler", "state", "last_batch_iteration", value="x"))
    loader = make(config=schedule, seed=7)
    train(loader, 1)
    assert "the lr_scheduler refused its state" in refused(loader, tmp_path / "out")


def forge(path, name, data):
    """Puts other bytes into a file, with a manifest that agrees."""
    made = manifest.digest()
    made.update(data)
    (path / name).write_bytes(data)

    def change(body):
        file = next(file for file in body["files"] if file["name"] == name)
        file["bytes"], file["blake2b"] = len(data), made.hexdigest()

    rewrite(path, change)


def safetensors(described, data=b""):
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"12345",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}x",
        (2).to_bytes(8, "little") + b"[]",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        safetensors({"items.0.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}, b"\0" * 255),
        safetensors({"items.0.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [-8, 248]}}, b"\0" * 256),
        safetensors({"items.0.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 128]}}, b"\0" * 256),
        safetensors({"items.0.weight": {"dtype": "F99", "shape": [8, 8], "data_offsets": [0, 256]}}, b"\0" * 256),
        safetensors({"items.0.weight": {"shape": [8, 8]}}, b"\0" * 256),
        safetensors({"items.0.weight": 3}),
    ],
)
def test_files_that_are_no_safetensors_are_refused(make, tmp_path, saved, data):
    _, path = saved
    forge(path, FILES[0], data)
    assert "is not a safetensors file" in refused(make(seed=7), tmp_path / "out")


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_pickles_are_never_read(make, tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, path = saved
    engine = make(seed=7)
    attack = pickle.dumps(Attack())
    for name in FILES:
        whole = (path / name).read_bytes()
        (path / name).write_bytes(attack + b"\0" * (len(whole) - len(attack)))
        assert "is a Python pickle" in refused(engine, tmp_path / "out")
        (path / name).write_bytes(whole)
    (path / "manifest.json").write_bytes(attack)
    assert "manifest.json is a Python pickle" in refused(engine, tmp_path / "out")
    shutil.rmtree(path)
    path.write_bytes(attack)
    assert "is a Python pickle" in refused(engine, tmp_path / "out")
    path.unlink()
    path.mkdir()
    with zipfile.ZipFile(path / "mp_rank_00_model_states.pt", "w") as archive:
        archive.writestr("archive/data.pkl", attack)
    assert "mp_rank_00_model_states.pt is a Python pickle" in refused(engine, tmp_path / "out")
    (tmp_path / "out" / "latest").write_bytes(attack)
    assert "latest is damaged" in refused(engine, tmp_path / "out")
    assert not (tmp_path / "attacked").exists()


def test_missing_checkpoints_say_what_there_is(make, tmp_path, saved):
    engine, path = saved
    out = tmp_path / "out"
    assert "no checkpoint 'other'" in refused(engine, out, tag="other")
    assert "try tag='global_step3'" in refused(engine, out, tag="other")
    (out / "latest").write_text("gone\n")
    assert "no checkpoint 'gone' (named by `latest`)" in refused(engine, out)
    (out / "latest").unlink()
    assert "has no file `latest`: give tag='global_step3'" in refused(engine, out)
    assert f"load '{out}' with tag='global_step3'" in refused(engine, path)
    (tmp_path / "nothing").mkdir()
    assert "it holds no checkpoint" in refused(engine, tmp_path / "nothing")
    assert "does not exist" in refused(engine, tmp_path / "absent")
    assert "is a file" in refused(engine, path / "manifest.json")


def test_a_file_that_changes_after_it_was_verified_is_not_read(make, tmp_path, saved, monkeypatch):
    _, path = saved
    engine = make(seed=7)
    from zeroxide.checkpoint import load

    apply = load._Load.apply

    def late(self):
        data = (path / FILES[1]).read_bytes()
        (path / FILES[1]).unlink()
        (path / FILES[1]).write_bytes(data)
        apply(self)

    monkeypatch.setattr(load._Load, "apply", late)
    with pytest.raises(CheckpointError, match=r"stopped in the middle .*has changed while.* holds a mixture"):
        engine.load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("offload", ["none", "nvme"])
def test_an_error_while_filling_is_said_and_loading_again_heals(make, tmp_path, saved, monkeypatch, offload):
    saver, _ = saved
    expected = state(saver)
    (tmp_path / "scratch").mkdir()
    engine = make(offload if offload == "none" else f"nvme:{tmp_path / 'scratch'}", seed=7)
    preadv = os.preadv
    for fail_at in (0, 1, 5, 12):
        left = iter(range(fail_at))

        def failing(*args, left=left):
            if next(left, None) is None:
                raise OSError(errno.EIO, "Input/output error")
            return preadv(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", failing)
            with pytest.raises(CheckpointError, match=r"stopped in the middle .*Input/output error.* a mixture"):
                engine.load_checkpoint(tmp_path / "out")
        engine.load_checkpoint(tmp_path / "out")
        assert {**state(engine), "rng": 0} == {**expected, "rng": 0}


def test_an_interrupt_while_filling_says_so(make, tmp_path, saved, monkeypatch):
    engine = make(seed=7)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            engine.load_checkpoint(tmp_path / "out")
    assert "holds a mixture" in caught.value.__notes__[0]
    engine.load_checkpoint(tmp_path / "out")


def test_no_room_for_what_stays_is_found_before_anything_changes(make, tmp_path, monkeypatch):
    def frozen():
        model = Model()
        model.items[0].weight.requires_grad_(False)
        return model

    make(model=frozen()).save_checkpoint(tmp_path / "out", exclude_frozen_parameters=True)
    engine = make(model=frozen(), seed=7)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "no room for the values that stay" in refused(engine, tmp_path / "out")


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
    monkeypatch.setattr("zeroxide.checkpoint.save._check_room", lambda *args: None)
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
