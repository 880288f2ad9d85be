"""Checkpoints of several ranks: written together, loaded at any other number of ranks, refused by all or none.

The ranks are threads with an engine each, which holds everything but saves and loads only its slice of each unit.
"""

import hashlib
import itertools
import json
import os
import random
import threading

import pytest
import several_ranks
import torch
from checkpointing import PARTS, SCHEDULES, Model, assemble, freeze, state, train
from several_ranks import join, on_all, own_state, put_together

from zeroxide.checkpoint.format import cutting
from zeroxide.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("sharded")
HOMES = [("none", "split"), ("cpu", "fp32"), ("nvme", "split")]


def world(make, size, home=("none", "split"), *, steps=0, seed=0, **more):
    """Engines in step with one another, as the ranks of a data-parallel job with equal batches are."""
    engines = []
    for _ in range(size):
        engine = make(*home, seed=seed, **more)
        train(engine, 0, steps)
        engines.append(engine)
    return join(engines)


def save(engines, folder, **more):
    return on_all(engines, lambda engine: engine.save_checkpoint(folder, **more))[0]


def counters(engine):
    return engine.global_steps, engine.micro_steps, engine.optimizer.hyperparameters()


@pytest.mark.parametrize("limit", [1 << 31, 900])
@pytest.mark.parametrize("home", HOMES, ids="-".join)
@pytest.mark.parametrize(("there", "here"), [(1, 3), (2, 1), (2, 2), (3, 2), (4, 3)])
def test_any_number_of_ranks_loads_what_any_number_saved(make, tmp_path, monkeypatch, there, here, home, limit):
    monkeypatch.setattr(cutting, "FILE_BYTES", limit)
    savers = world(make, there, steps=2, model=None)
    expected = put_together(savers)
    path = save(savers, tmp_path / "out", client_state={"epoch": 1})
    loaders = world(make, here, home, seed=7)
    assert not any(values.equal(expected[key]) for key, values in put_together(loaders).items() if "up" in key[0])
    found = on_all(loaders, lambda engine: engine.load_checkpoint(tmp_path / "out"))
    assert found == [(path, {"epoch": 1})] * here
    loaded = put_together(loaders)
    assert loaded.keys() == expected.keys()
    for key, values in expected.items():
        assert loaded[key].equal(values), key
    assert {str(counters(engine)) for engine in loaders} == {str(counters(savers[0]))}
    for engine in loaders:
        for name, buffer in savers[0].module.named_buffers():
            assert dict(engine.module.named_buffers())[name].equal(buffer), name


def test_every_rank_writes_its_own_share_and_no_element_twice(make, tmp_path):
    engines = world(make, 3, steps=2)
    path = save(engines, tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text())
    names = {file.name for file in path.iterdir()} - {"manifest.json"}
    assert names == {
        *(f"{part}-rank{rank:05}-00001.safetensors" for part in PARTS for rank in range(3)),
        "buffers-rank00000-00001.safetensors",
    }
    assert {file["name"] for file in manifest["files"]} == names
    sizes = [sum(file["bytes"] for file in manifest["files"] if f"rank{rank:05}" in file["name"]) for rank in range(3)]
    assert max(sizes) < 1.1 * min(sizes) + 4096
    whole = put_together(engines)
    assert sum(piece["count"] for each in manifest["parameters"] for piece in each["weights"]) == sum(
        values.numel() for (_, part), values in whole.items() if part == "weights"
    )
    for part in PARTS:
        for name, tensor in assemble(path, part).items():
            assert tensor.flatten().view(torch.int32).equal(whole[name, part]), name
    assert len(manifest["generators"]) == 3


def test_ranks_may_hold_their_slices_in_any_order(make, tmp_path, monkeypatch):
    real = several_ranks.run_on
    monkeypatch.setattr(several_ranks, "run_on", lambda held, rank, world: real(held, world - 1 - rank, world))
    savers = world(make, 3, steps=1)
    expected = put_together(savers)
    save(savers, tmp_path / "out")
    loader = make(seed=7)
    loader.load_checkpoint(tmp_path / "out")
    found = put_together([loader])
    assert all(found[key].equal(values) for key, values in expected.items())


def test_loading_reads_only_the_ranges_that_a_rank_holds(make, tmp_path, monkeypatch):
    from zeroxide.checkpoint.load import source

    path = save(world(make, 1, steps=1), tmp_path / "out")
    engines = world(make, 4, seed=7)
    read = []
    real = source._File.read
    monkeypatch.setattr(
        source._File,
        "read",
        lambda self, into, start: (read.append(sum(each.nbytes for each in into)), real(self, into, start)),
    )
    on_all(engines, lambda engine: engine.load_checkpoint(tmp_path / "out"))
    files = {file.name: file.stat().st_size for file in path.iterdir()}
    buffers = files["buffers-00001.safetensors"]
    # All ranks together read every element of the state once, and each of them the buffers.
    assert sum(read) <= sum(files.values()) - files["manifest.json"] + 3 * buffers
    assert sum(read) > 0.9 * (sum(files.values()) - files["manifest.json"])


def test_every_file_is_verified_by_one_rank(make, tmp_path, monkeypatch):
    from zeroxide.checkpoint.load import source

    path = save(world(make, 2, steps=1), tmp_path / "out")
    seen = []
    real = source._File.verify
    monkeypatch.setattr(source._File, "verify", lambda self: (seen.append(self.path.name), real(self)))
    on_all(world(make, 3, seed=7), lambda engine: engine.load_checkpoint(tmp_path / "out"))
    assert sorted(seen) == sorted(file.name for file in path.glob("*.safetensors"))


def test_frozen_parameters_may_be_left_out_at_any_number_of_ranks(make, tmp_path):
    savers = join([make("none", "split", model=freeze(Model()), seed=0) for _ in range(2)])
    for engine in savers:
        train(engine, 0, 2)
    path = save(savers, tmp_path / "out", exclude_frozen_parameters=True)
    frozen = {name for name, param in freeze(Model()).named_parameters() if not param.requires_grad}
    assert not frozen & assemble(path, "weights").keys()
    torch.manual_seed(9)
    loaders = join([make("nvme", "fp32", model=freeze(Model()), seed=9) for _ in range(3)])
    before, there = put_together(loaders), put_together(savers)
    on_all(loaders, lambda engine: engine.load_checkpoint(tmp_path / "out"))
    for key, values in put_together(loaders).items():
        source = before if key[0] in frozen and key[1] == "weights" else there
        assert values.equal(source[key]), key


def test_generators_go_on_rank_by_rank(make, tmp_path, monkeypatch):
    """Threads share a process's generators, so here a rank's are a number of its own."""
    from zeroxide.checkpoint.format import generators

    present = {}
    engines = world(make, 2)

    def mine():
        return threading.current_thread().name

    monkeypatch.setattr(generators, "read", lambda: {"of": random.Random(mine()).random()})
    monkeypatch.setattr(generators, "check", lambda states: None)
    monkeypatch.setattr(generators, "restore", lambda states: present.setdefault(mine(), []).append(states["of"]))
    path = save(engines, tmp_path / "out")
    saved = [each["of"] for each in json.loads((path / "manifest.json").read_text())["generators"]]
    assert len(set(saved)) == 2
    on_all(world(make, 3, seed=7), lambda engine: engine.load_checkpoint(tmp_path / "out"))
    # The third rank has nothing to go on from.
    assert sorted(each for states in present.values() for each in states) == sorted(saved)


def test_schedules_go_on_at_all_ranks(make, tmp_path):
    savers = world(make, 2, steps=3, lr_scheduler=SCHEDULES["ExponentialLR"])
    save(savers, tmp_path / "out")
    loaders = world(make, 3, lr_scheduler=SCHEDULES["ExponentialLR"], seed=7)
    on_all(loaders, lambda engine: engine.load_checkpoint(tmp_path / "out"))
    assert {str(engine.get_lr()) for engine in loaders} == {str(savers[0].get_lr())}


def as_before(path, version):
    """Writes a manifest as an earlier version did."""
    from zeroxide.checkpoint.format import manifest

    body = json.loads((path / "manifest.json").read_text())
    del body["digest"]
    body["version"] = version
    for file in body["files"]:
        del file["crc64nvme"]
        file["blake2b"] = hashlib.blake2b((path / file["name"]).read_bytes(), digest_size=16).hexdigest()
    for param in body["parameters"] if version < 3 else ():
        param.update(param.pop("state"))
    if version == 1:
        body["generators"] = body["generators"][0]
    body["digest"] = manifest._digest_of(body)
    (path / "manifest.json").write_text(json.dumps(body))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_checkpoint_of_an_earlier_version_loads(make, tmp_path, version):
    saver = make()
    train(saver, 0, 2)
    expected = put_together([saver])
    path = saver.save_checkpoint(tmp_path / "out")
    as_before(path, version)
    loaders = world(make, 2, seed=7)
    on_all(loaders, lambda engine: engine.load_checkpoint(tmp_path / "out"))
    loaded = put_together(loaders)
    assert all(loaded[key].equal(values) for key, values in expected.items())
    # Its generators are those of rank 0.
    alone = make(seed=7)
    alone.load_checkpoint(tmp_path / "out")
    assert alone.global_steps == 2
    # Its checksums count.
    file = next(path.glob("weights-*"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"is damaged: its checksum should be [0-9a-f]{32} and is "):
        alone.load_checkpoint(tmp_path / "out")


# Refusals ----------------------------------------------------------------------------------------------------------


def refusals(engines, act):
    """What each rank raised; nothing has changed on any."""
    before = [state(engine) for engine in engines]
    errors = on_all(engines, act, errors=True)
    for engine, was in zip(engines, before, strict=True):
        now = state(engine)
        assert all(
            torch.equal(now[key], was[key]) if torch.is_tensor(was[key]) else now[key] == was[key] for key in was
        )
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert all("\n" not in str(error) for error in errors)
    return [str(error) for error in errors]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_save_stops_all(make, tmp_path, rank):
    engines = world(make, 2, steps=1)
    engines[rank].backward(engines[rank](torch.zeros(2, 8, dtype=torch.long)))
    lines = refusals(engines, lambda engine: engine.save_checkpoint(tmp_path / "out"))
    assert lines[0] == lines[1]
    assert f"rank {rank}: a checkpoint cannot be saved with" in lines[0]
    assert not (tmp_path / "out").exists()


def test_what_all_ranks_say_is_laid_at_no_rank_in_particular(make, tmp_path):
    engines = world(make, 2)
    lines = refusals(engines, lambda engine: engine.save_checkpoint(tmp_path / "out", "a/b"))
    assert lines[0] == lines[1]
    assert lines[0].startswith("tag 'a/b' cannot name a checkpoint")


def test_ranks_that_save_different_checkpoints_are_refused(make, tmp_path):
    engines = world(make, 2)
    lines = refusals(engines, lambda engine: engine.save_checkpoint(tmp_path / "out", f"tag{engine.fake.rank}"))
    assert lines == ["the ranks save different checkpoints: tag is 'tag0' on rank 0 and 'tag1' on rank 1"] * 2
    train(engines[1], 0, 1)
    lines = refusals(engines, lambda engine: engine.save_checkpoint(tmp_path / "out", "same"))
    assert lines == ["the ranks save different checkpoints: step is 0 on rank 0 and 1 on rank 1"] * 2
    assert not (tmp_path / "out").exists()


def test_ranks_that_load_differently_are_refused(make, tmp_path):
    engines = world(make, 2)
    save(engines, tmp_path / "out", tag="one")
    save(engines, tmp_path / "out", tag="two")
    lines = refusals(
        engines, lambda engine: engine.load_checkpoint(tmp_path / "out", "one" if engine.fake.rank else "two")
    )
    assert lines == ["the ranks load different checkpoints: tag is 'two' on rank 0 and 'one' on rank 1"] * 2
    lines = refusals(
        engines, lambda engine: engine.load_checkpoint(tmp_path / "out", load_optimizer_states=not engine.fake.rank)
    )
    assert (
        lines
        == ["the ranks load different checkpoints: load_optimizer_states is True on rank 0 and False on rank 1"] * 2
    )


def test_a_directory_that_only_one_rank_sees_is_refused(make, tmp_path):
    engines = world(make, 2)
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    lines = refusals(engines, lambda engine: engine.save_checkpoint(tmp_path / str(engine.fake.rank), "tag"))
    assert lines[0] == lines[1]
    assert "rank 1: " in lines[0]
    assert "save_dir must be on a file system that all ranks share" in lines[0]
    assert not any((tmp_path / "0").iterdir())


def test_another_model_is_refused_by_all(make, tmp_path):
    save(world(make, 2, model=None), tmp_path / "out")
    engines = join([make(model=Model(layers=3)), make(model=Model(layers=3, vocabulary=49))])
    lines = refusals(engines, lambda engine: engine.load_checkpoint(tmp_path / "out"))
    assert lines[0] == lines[1]
    assert lines[0].startswith("rank 1: ")
    assert "was saved from another model" in lines[0]


def test_a_rank_that_fails_while_filling_stops_all_and_says_so(make, tmp_path, monkeypatch):
    from zeroxide.checkpoint.load import source

    save(world(make, 2, steps=1), tmp_path / "out")
    engines = world(make, 2, seed=7)
    real = source._File.read
    failing = engines[1]

    def read(self, into, start):
        if threading.current_thread() is failing.thread:
            raise CheckpointError("the disk has gone")
        return real(self, into, start)

    def load(engine):
        engine.thread = threading.current_thread()
        engine.load_checkpoint(tmp_path / "out")

    with monkeypatch.context() as patched:
        patched.setattr(source._File, "read", read)
        errors = on_all(engines, load, errors=True)
    lines = [str(error) for error in errors]
    assert lines[0] == lines[1]
    assert "stopped in the middle (rank 1: the disk has gone): the engine now holds a mixture" in lines[0]
    # No fill stayed open: loading again heals.
    on_all(engines, lambda engine: engine.load_checkpoint(tmp_path / "out"))
    expected = put_together(world(make, 2, steps=1))
    assert all(expected[key].equal(values) for key, values in put_together(engines).items())


def test_the_state_of_a_single_rank_is_its_slice(make):
    """What these tests stand on: slices differ between ranks and make up the whole."""
    engines = world(make, 3)
    assert len({frozenset(own_state(engine)) for engine in engines}) == 3
    whole = put_together(world(make, 1))
    parts = put_together(engines)
    assert all(parts[key].equal(values) for key, values in whole.items())


# Exported models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1 << 31, 5000])
@pytest.mark.parametrize("home", HOMES, ids="-".join)
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_write_one_model(make, tmp_path, monkeypatch, size, home, limit):
    """File for file the bytes that a single rank writes."""
    monkeypatch.setattr(cutting, "FILE_BYTES", limit)
    alone = make(*home)
    train(alone, 0, 2)
    alone.save_16bit_model(tmp_path / "one")
    engines = world(make, size, home, steps=2)
    paths = on_all(engines, lambda engine: engine.save_16bit_model(tmp_path / "all"))
    assert len(set(paths)) == 1
    assert paths[0].is_file()
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == files
    assert (len(files) > 4) == (limit == 5000)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / name).read_bytes(), name


def test_no_rank_writes_what_another_one_holds(make, tmp_path, monkeypatch):
    engines = world(make, 2)
    written = []
    pwrite = os.pwrite

    def record(descriptor, data, at):
        count = pwrite(descriptor, data[: max(1, len(data) // 2)], at)
        written.append((at, at + count))
        return count

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", record)
        path = on_all(engines, lambda engine: engine.save_16bit_model(tmp_path / "model"))[0]
    spans = sorted(written)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    data = path.read_bytes()
    assert sum(end - begin for begin, end in spans) == len(data) - 8 - int.from_bytes(data[:8], "little")


def test_an_export_that_fails_at_one_rank_leaves_the_folder_as_it_was(make, tmp_path, monkeypatch):
    from zeroxide.checkpoint.convert import export
    from zeroxide.errors import ConfigError, StorageError

    engines = world(make, 2)
    on_all(engines, lambda engine: engine.save_16bit_model(tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    for engine in engines:
        train(engine, 0, 1)
    real = export._Export._write_own

    def full(self):
        if self.team.rank == 1:
            raise OSError(28, "No space left on device")
        real(self)

    with monkeypatch.context() as patched:
        patched.setattr(export._Export, "_write_own", full)
        errors = on_all(engines, lambda engine: engine.save_16bit_model(tmp_path / "model"), errors=True)
    assert [type(error) for error in errors] == [StorageError] * 2
    assert "rank 1: the model was not written to" in str(errors[0])
    assert str(errors[0]) == str(errors[1])
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    errors = on_all(engines, lambda engine: engine.save_16bit_model(tmp_path / "model", "model.ckpt"), errors=True)
    assert [type(error) for error in errors] == [ConfigError] * 2


def test_frozen_parameters_may_be_left_out_of_an_export(make, tmp_path):
    from safetensors.torch import load_file

    engines = join([make(model=freeze(Model())) for _ in range(2)])
    path = on_all(engines, lambda engine: engine.save_16bit_model(tmp_path, exclude_frozen_parameters=True))[0]
    frozen = {name for name, param in freeze(Model()).named_parameters() if not param.requires_grad}
    names = {name for name, _ in Model().named_parameters()} - frozen
    assert load_file(path).keys() - {name for name, _ in Model().named_buffers()} == names
