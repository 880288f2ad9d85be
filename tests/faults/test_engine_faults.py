"""What the engine says and does when memory, disk or data are not as hoped: one named error, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import batches, build

import zeroxide
from zeroxide import _core
from zeroxide.device.placement import spec
from zeroxide.errors import BudgetError, ConfigError, ModelError, StorageError


def start(directory, **more):
    arguments = {"lr": 1e-3, "dtype": "bf16", "offload": f"nvme:{directory}", **more}
    engine, *_ = zeroxide.initialize(model=build("gpt"), **arguments)
    return engine


def train(engine, count=1, seed=1):
    for batch in batches("gpt", count, seed=seed):
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()


def scratch_file(directory) -> Path:
    (found,) = Path(directory).glob("*/blocks.bin")
    return found


def weights(engine):
    """Master weights of every parameter."""
    found = []
    for unit in engine.parts.units:
        for position, shape in enumerate(unit.shapes):
            values = torch.empty(shape.numel())
            engine.parts.core().read_param(unit.index, position, "weights", 0, spec(values))
            found.append(values)
    return found


# Budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_says_how_much_is_missing_and_for_what(tmp_path):
    resident = _core.resident()["rss"]
    with pytest.raises(BudgetError) as caught:
        start(tmp_path, host_memory=resident + (1 << 20))
    message = str(caught.value)
    assert "too small by" in message
    assert "staging" in message
    assert caught.value.need > caught.value.limit
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_activations_break_is_an_error_after_an_intact_step(tmp_path):
    engine = start(tmp_path)
    with_limit = _core.resident()["peak"] - 1
    object.__setattr__(engine.resolved_config.zeroxide, "host_memory", with_limit)
    before = weights(engine)
    with pytest.raises(BudgetError, match="everything is intact"):
        train(engine)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True)), "the step was made"
    object.__setattr__(engine.resolved_config.zeroxide, "host_memory", None)
    train(engine)
    engine.destroy()


@pytest.mark.parametrize("host_memory", [0, -1, "0GiB", "many", "1e99GiB"])
def test_absurd_budgets_are_refused(host_memory, tmp_path):
    with pytest.raises(ConfigError):
        start(tmp_path, host_memory=host_memory)


# Paths ------------------------------------------------------------------------------------------------------------


def test_a_path_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(StorageError, match="file"):
        start(file)
    assert file.read_text() == "kept"


def test_a_path_whose_parent_is_missing(tmp_path):
    with pytest.raises(StorageError, match="missing"):
        start(tmp_path / "missing" / "further" / "down")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with less room than the state of the smallest model."""
    target = tmp_path / "small"
    target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", target], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs rights that this process lacks: {mounted.stderr.decode()}")
    yield target
    subprocess.run(["umount", "-l", target], check=True)


def test_a_full_disk_is_found_at_the_start(small_disk):
    with pytest.raises(StorageError, match=r"(?i)space|free"):
        start(small_disk)
    assert list(small_disk.iterdir()) == []


def test_a_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match=r"(?i)read-only"):
        start(small_disk)


def test_a_file_system_without_direct_io(tmp_path):
    target = tmp_path / "ram"
    target.mkdir()
    mounted = subprocess.run(["mount", "-t", "ramfs", "none", target], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting ramfs needs rights that this process lacks: {mounted.stderr.decode()}")
    try:
        losses = []
        for directory in (target, tmp_path):
            engine = start(directory)
            train(engine, 3)
            losses.append(float(engine.get_global_grad_norm()))
            engine.destroy()
        assert losses[0] == losses[1]
    finally:
        subprocess.run(["umount", "-l", target], check=True)


def test_two_engines_share_a_directory_without_touching_one_another(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    train(first, 2)
    second.destroy()
    train(first, 1)
    first.destroy()
    assert list(tmp_path.iterdir()) == []


# The disk goes wrong while training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["overwritten", "cut short"])
def test_damage_on_disk_never_becomes_a_number(damage, tmp_path):
    """Catches: a checksum that is not compared, a short read taken for a whole one, a poisoned state that goes on."""
    engine = start(tmp_path / "scratch")
    train(engine, 2)
    engine.save_checkpoint(tmp_path / "saved")
    engine.finish_step()
    file = scratch_file(tmp_path / "scratch")
    if damage == "cut short":
        os.truncate(file, 0)
    else:
        size = file.stat().st_size
        with file.open("r+b") as handle:
            handle.write(os.urandom(size))
    with pytest.raises(StorageError) as caught:
        train(engine, 2)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    engine.destroy()

    again = start(tmp_path / "scratch")
    again.load_checkpoint(tmp_path / "saved")
    train(again, 1)
    assert again.was_step_applied()
    again.destroy()


def test_an_error_in_the_middle_of_a_step_stops_every_further_use(tmp_path):
    """With the weights in memory only the step reads: its error must not be forgotten."""
    engine = start(tmp_path, offload="cpu", offload_optimizer=f"nvme:{tmp_path}")
    train(engine, 2)
    engine.finish_step()
    os.truncate(scratch_file(tmp_path), 0)
    with pytest.raises(StorageError):
        train(engine, 2)
    with pytest.raises(StorageError, match="checkpoint"):
        train(engine, 1)
    engine.destroy()
    assert list(tmp_path.iterdir()) == []


# Models and losses -------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_trained_are_named(tmp_path):
    with pytest.raises(ModelError, match="no parameters"):
        zeroxide.initialize(model=torch.nn.ReLU(), lr=1e-3)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ModelError, match="frozen"):
        zeroxide.initialize(model=frozen, lr=1e-3)
    whole = torch.nn.Linear(2, 2)
    whole.count = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ModelError, match="count"):
        zeroxide.initialize(model=whole, lr=1e-3)
    split = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(ModelError, match="two devices"):
        zeroxide.initialize(model=split, lr=1e-3)


def test_a_loss_that_is_not_a_number_changes_nothing(tmp_path):
    engine = start(tmp_path)
    train(engine, 1)
    before = weights(engine)
    (batch,) = batches("gpt", 1)
    engine.backward(engine(**batch) * float("nan"))
    engine.step()
    assert not engine.was_step_applied()
    assert engine.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    train(engine, 1)
    assert engine.was_step_applied()
    engine.destroy()


# Processes ------------------------------------------------------------------------------------------------------------


CHILD = """
import os, signal, sys, threading
sys.path[:0] = {paths!r}
import torch
from test_engine_faults import batches, start, train
from zeroxide.device.placement import spec
engine = start(sys.argv[1])
train(engine, 1)
(batch,) = batches("gpt", 1)
over = threading.Event()

def read():
    # So that a call runs at nearly every moment: the child gets its lock without the thread that would give it back.
    row = torch.empty(engine.parts.units[0].shapes[0][-1])
    while not over.is_set():
        engine.parts.core().read_param(0, 0, "exp_avg", 0, spec(row))

def code_of_child(leave):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(60)
    try:
        engine(**batch)
    except RuntimeError as error:
        if "forked child" in str(error):
            engine.destroy()
            leave(7)
    os._exit(9)

reader = threading.Thread(target=read)
reader.start()
codes = [code_of_child(os._exit) for _ in range(10)]
over.set()
reader.join()
codes.append(code_of_child(sys.exit))
train(engine, 1)
engine.destroy()
assert codes == [7] * 11, codes
"""


def test_a_forked_child_gets_an_error_and_the_parent_goes_on(tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent / "numerics")]
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(paths=paths), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
