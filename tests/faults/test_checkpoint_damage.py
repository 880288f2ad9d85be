"""Damaged, forged and missing checkpoints: refused in one line, without a change to the engine."""

import errno
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from saving import Model, refused, state, train

from zeroxide.checkpoint.format import manifest
from zeroxide.errors import CheckpointError

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
    (("version",), 6, "has version 6, this zeroxide reads up to 5: load it with zeroxide"),
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
    (("parameters", 0, "weights", 0, "dtype"), "F99", "unknown dtype 'F99'"),
    (("parameters", 0, "names"), ["items.1.weight"], "two parameters are called items.1.weight"),
    (("client_state",), [1], "client_state is no dict"),
    (("groups", 0, "hyperparameters"), 5, "an optimizer group is no dict"),
    (("generators", 0, "torch"), "AAAA", "is not well-formed"),
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


class Hesitant(torch.optim.lr_scheduler.StepLR):
    """Fails to load, but only after it has changed itself and the optimizer."""

    refuses = False

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group in self.optimizer.param_groups:
            group["lr"] = 5.0
        if self.refuses:
            type(self).refuses = False
            raise ValueError("no")


def test_a_schedule_that_fails_to_load_is_put_back(make, tmp_path, monkeypatch):
    saver = make(lr_scheduler=lambda optimizer: Hesitant(optimizer, 1, 0.5))
    train(saver, 3)
    saver.save_checkpoint(tmp_path / "out")
    loader = make(lr_scheduler=lambda optimizer: Hesitant(optimizer, 1, 0.5), seed=7)
    train(loader, 1)
    monkeypatch.setattr(Hesitant, "refuses", True)
    assert "the lr_scheduler refused its state (ValueError: no)" in refused(loader, tmp_path / "out")


def forge(path, name, data):
    """Puts other bytes into a file, with a manifest that agrees."""
    made = manifest.digest()
    made.update(data)
    (path / name).write_bytes(data)

    def change(body):
        file = next(file for file in body["files"] if file["name"] == name)
        del file["crc64nvme"]
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
        # Trailing bytes, a hole before a tensor, two tensors in one place, a shape that overflows.
        safetensors({"items.0.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}, b"\0" * 260),
        safetensors({"items.0.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [4, 260]}}, b"\0" * 260),
        safetensors(
            {
                "items.0.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]},
                "other": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]},
            },
            b"\0" * 256,
        ),
        safetensors(
            {"items.0.weight": {"dtype": "F32", "shape": [1 << 62, 16], "data_offsets": [0, 256]}}, b"\0" * 256
        ),
        safetensors({"items.0.weight": {"dtype": "F32", "shape": [8.0, 8], "data_offsets": [0, 256]}}, b"\0" * 256),
        safetensors({"__metadata__": {"a": 1}}),
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
    for empty in ("nothing", "absent"):
        assert engine.load_checkpoint(tmp_path / empty) == (None, None)
    assert "it holds no checkpoint" in refused(engine, tmp_path / "nothing", tag="t")
    assert "does not exist" in refused(engine, tmp_path / "absent", tag="t")
    assert "is a file" in refused(engine, path / "manifest.json")


def test_a_file_that_changes_after_it_was_verified_is_not_read(make, tmp_path, saved, monkeypatch):
    _, path = saved
    engine = make(seed=7)
    from zeroxide.checkpoint.load import load

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
    from zeroxide.checkpoint.load import source

    read_scattered = source.read_scattered
    for fail_at in (0, 1, 5, 12):
        left = iter(range(fail_at))

        def failing(*args, left=left):
            if next(left, None) is None:
                raise OSError(errno.EIO, "Input/output error")
            return read_scattered(*args)

        with monkeypatch.context() as patched:
            patched.setattr(source, "read_scattered", failing)
            with pytest.raises(CheckpointError, match=r"stopped in the middle .*Input/output error.* a mixture"):
                engine.load_checkpoint(tmp_path / "out")
        engine.load_checkpoint(tmp_path / "out")
        assert {**state(engine), "rng": 0} == {**expected, "rng": 0}


def test_an_interrupt_while_filling_says_so(make, tmp_path, saved, monkeypatch):
    from zeroxide.checkpoint.load import source

    engine = make(seed=7)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(source, "read_scattered", interrupted)
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
