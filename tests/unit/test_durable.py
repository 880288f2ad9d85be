"""Durable runs in one process: going on from a commit, what is refused, and saves that read a commit."""

import json
import shutil
import time

import pytest
import torch
from checkpointing import Model, state, train

from zeroxide import _core
from zeroxide.checkpoint.save import background
from zeroxide.errors import CheckpointError, ConfigError, ModelError, StorageError
from zeroxide.zero import durable as durable_module

STAGES = [1, 3]


def durable(make, every=1, stage=3, param="nvme", tmp_path=None, **more):
    path = str(tmp_path)
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": path}}
    if stage == 3 and param == "nvme":
        offload["offload_param"] = {"device": "nvme", "nvme_path": path}
    config = {"zero_optimization": {"stage": stage, **offload}, **more.pop("config", {})}
    own = {"durable_every": every, **more.pop("own", {})}
    return make(offload=None, zeroxide_config=own, config=config, **more)


@pytest.fixture
def run(make, tmp_path):
    """Makes durable engines over one directory."""
    folder = tmp_path / "durable"
    folder.mkdir()
    return lambda **more: durable(make, tmp_path=folder, **more)


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key


KEPT = [("split", "host"), ("split", "disk"), ("compact", "disk"), ("split-bf16", "host")]
"""Formats of state, and where gradients wait."""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("fmt", "gradients"), KEPT)
def test_going_on_brings_back_everything(run, make, stage, fmt, gradients):
    kept = {"fmt": fmt, "own": {"gradients": gradients}}
    uninterrupted = make(fmt=fmt, config={"zero_optimization": {"stage": stage}})
    expected_losses = train(uninterrupted, 0, 6)[4:]
    first = run(every=2, stage=stage, **kept)
    assert first.resume() == 0
    first.client_state["batch"] = [1, (2, 3)]
    train(first, 0, 4)
    expected = state(first)
    generator = torch.get_rng_state()
    # Not committed, and forgotten.
    train(first, 4, 5)
    first.destroy()
    torch.manual_seed(123)
    second = run(every=2, stage=stage, seed=5, **kept)
    assert second.resume() == second.global_steps == 4
    assert torch.equal(torch.get_rng_state(), generator)
    assert second.client_state == {"batch": [1, (2, 3)]}
    same(state(second), expected)
    losses = train(second, 4, 6)
    second.destroy()
    assert losses == expected_losses
    third = run(every=2, stage=stage, **kept)
    assert third.resume() == 6
    same(state(third), state(uninterrupted))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fmt", ["split", "compact"])
def test_a_save_reads_the_commit_while_training_goes_on(run, make, tmp_path, stage, fmt, monkeypatch):
    engine = run(stage=stage, fmt=fmt)
    train(engine, 0, 2)
    expected = state(engine)
    slow = background.BackgroundSave._values

    def values(self):
        for chunk in slow(self):
            time.sleep(0.01)
            yield chunk

    monkeypatch.setattr(background.BackgroundSave, "_values", values)
    engine.save_checkpoint(tmp_path / "saved")
    # Tiles of the step after are written to the other slots, and the commit after that waits.
    train(engine, 2, 5)
    assert engine.wait_for_checkpoint() == tmp_path / "saved" / "global_step2"
    assert engine.checkpoint_stats()["saves"] == 1
    engine.destroy()
    other = make(fmt=fmt, config={"zero_optimization": {"stage": 0}})
    other.load_checkpoint(tmp_path / "saved")
    same(state(other), expected)


def test_the_next_commit_ends_the_rest_of_a_save(run, tmp_path, monkeypatch):
    """Catches: a save that takes whole cores although nobody waits, and a commit that waits for one that rests."""
    monkeypatch.setattr("zeroxide.checkpoint.save.pace.SHARE", 1e-9)
    monkeypatch.setattr("zeroxide.checkpoint.save.pace.LEAST_SECONDS", 0)
    engine = run()
    train(engine, 0, 2)
    engine.save_checkpoint(tmp_path / "saved")
    time.sleep(0.3)
    assert engine.checkpoint_stats()["under_way"]
    train(engine, 2, 4)
    assert engine.wait_for_checkpoint() == tmp_path / "saved" / "global_step2"


def test_a_save_between_commits_commits_first(run, tmp_path):
    engine = run(every=100)
    train(engine, 0, 3)
    engine.save_checkpoint(tmp_path / "saved")
    engine.wait_for_checkpoint()
    engine.destroy()
    second = run(every=100)
    assert second.resume() == 3


def test_an_edit_after_a_commit_is_in_the_save(run, make, tmp_path):
    engine = run(stage=1)
    train(engine, 0, 1)
    with torch.no_grad():
        engine.module.blocks[0].up.weight.add_(0.5)
    expected = engine.module.blocks[0].up.weight.detach().clone()
    engine.save_checkpoint(tmp_path / "saved")
    engine.wait_for_checkpoint()
    engine.destroy()
    other = make(config={"zero_optimization": {"stage": 0}})
    other.load_checkpoint(tmp_path / "saved")
    assert torch.equal(other.module.blocks[0].up.weight, expected)


def test_a_save_with_gradients_that_wait_reads_no_commit(run, tmp_path):
    engine = run(config={"gradient_accumulation_steps": 2})
    train(engine, 0, 1)
    with pytest.raises(CheckpointError, match="after micro-batch 1 of 2"):
        engine.save_checkpoint(tmp_path / "saved")
    engine.save_checkpoint(tmp_path / "saved", leave_out_gradients=True)
    assert engine._durable.stats["commits"] == 0


def test_training_on_without_a_word_is_refused(run):
    first = run()
    train(first, 0, 2)
    first.destroy()
    second = run()
    with pytest.raises(CheckpointError, match="has step 2 of a run: call engine"):
        train(second, 0, 1)
    second.destroy()
    third = run()
    assert third.resume() == 2


def test_two_processes_of_one_run_are_refused(run):
    run()
    with pytest.raises(StorageError, match="already in use by live run pid"):
        run()
    with_name = run(own={"durable_name": "other"})
    assert with_name.resume() == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stage": 1}, "stage 3, and this one has 1"),
        ({"model": lambda: Model(layers=2)}, "model with names and shapes"),
        ({"fmt": "fp32"}, "format split, and this one has fp32"),
        ({"param": "none"}, "homes of weights, state and gradients"),
    ],
)
def test_another_run_is_refused_by_name_and_changes_nothing(run, change, word):
    first = run()
    train(first, 0, 2)
    expected = state(first)
    first.destroy()
    change = {key: value() if callable(value) else value for key, value in change.items()}
    with pytest.raises(StorageError, match=word):
        run(**change)
    second = run()
    assert second.resume() == 2
    same(state(second), expected)


def test_what_cannot_be_durable_is_refused(make, tmp_path):
    with pytest.raises(ConfigError, match="nothing is at home on disk") as refused:
        make(zeroxide_config={"durable_every": 1})
    assert refused.value.path == "zeroxide.durable_every"
    engine = make()
    with pytest.raises(ModelError, match="durable_every is 0"):
        engine.resume()
    with pytest.raises(ModelError, match="durable_every is 0"):
        print(engine.client_state)


def test_the_plan_counts_both_slots_and_what_is_in_memory(run, make):
    engine = run(param="none")
    directory = engine.training_state.durable_path
    assert (directory / "blocks.bin").stat().st_size == engine.plan().disk_bytes
    engine.destroy()
    with_both = make(offload="nvme", config={"zero_optimization": {"stage": 3}})
    # Weights in memory have two slots on disk as well.
    assert engine.plan().disk_bytes == 2 * engine.plan().numbers.durable_bytes // 2
    assert engine.plan().disk_bytes > 2 * engine.plan().numbers.disk_bytes
    assert with_both.plan().disk_bytes == with_both.plan().numbers.disk_bytes


@pytest.mark.parametrize("every", [0, 1])
def test_gradients_on_disk_have_one_place(run, make, tmp_path, every):
    """No commit holds them. Catches: two places, or none, in the plan or on the disk."""
    own = {"gradients": "disk"}
    engine = run(every=every, own=own)
    numbers = engine.plan().numbers
    files = list(tmp_path.rglob("blocks.bin"))
    assert sum(file.stat().st_size for file in files) == engine.plan().disk_bytes
    # bf16 gradients of everything that is trained.
    gradients = 2 * sum(trainable for trainable, _ in numbers.padded)
    engine.destroy()
    if every:
        shutil.rmtree(files[0].parent)
    before = run(every=every, own={"gradients": "host"}).plan().disk_bytes
    assert engine.plan().disk_bytes - before == gradients


def test_damage_is_named(run):
    first = run()
    train(first, 0, 1)
    directory = first.training_state.durable_path
    first.destroy()
    saved = directory.with_name("copy")
    shutil.copytree(directory, saved)
    for change, word in (
        (lambda: (directory / "blocks.bin").unlink(), "there is no blocks.bin"),
        (lambda: next(directory.glob("manifest-*")).write_text("x"), "not usable"),
    ):
        change()
        with pytest.raises(StorageError, match=word):
            run()
        shutil.rmtree(directory)
        shutil.copytree(saved, directory)
    assert run().resume() == 1


def test_a_failing_commit_is_raised_and_the_one_before_stays(run, monkeypatch):
    engine = run()
    train(engine, 0, 2)
    engine.client_state["bad"] = object()
    with pytest.raises(CheckpointError, match="client_state"):
        train(engine, 2, 3)
    engine.destroy()
    assert run().resume() == 2


def test_a_note_of_another_script_is_refused(run):
    first = run()
    train(first, 0, 1)
    first.destroy()
    second = run(config={"scheduler": {"type": "WarmupLR", "params": {}}})
    with pytest.raises(CheckpointError, match="the lr_scheduler was None"):
        second.resume()


def test_commits_say_what_they_are(run):
    engine = run()
    train(engine, 0, 1)
    commits = _core.Commits(engine.parts.core())
    with pytest.raises(StorageError, match="nothing was found"):
        commits.adopt(1)
    manifest = next(engine.training_state.durable_path.glob("manifest-*")).read_text()
    note = json.loads(json.loads(manifest.partition("\n")[2])["note"])
    assert note["counters"]["global_steps"] == 1


@pytest.mark.parametrize(
    ("found", "newest"),
    [
        ([[], []], 0),
        ([[3], [3]], 3),
        ([[3, 4], [3]], 3),
        ([[3, 4], [3, 4]], 4),
        ([[3], [3, 4]], 3),
        # The first commit was under way: nobody has gone on from it.
        ([[1], []], 0),
    ],
)
def test_ranks_go_on_from_the_newest_commit_that_all_have(found, newest):
    assert durable_module._newest(found) == newest


@pytest.mark.parametrize("found", [[[5], []], [[4, 5], [6]], [[2], []]])
def test_ranks_without_a_commit_in_common_are_refused(found):
    with pytest.raises(StorageError, match=r"no commit in common: rank 0 has \["):
        durable_module._newest(found)
