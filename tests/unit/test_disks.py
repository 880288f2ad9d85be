"""State that is dealt out over several disks."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide import _core
from zeroxide.config import load
from zeroxide.errors import StorageError
from zeroxide.zero import disks


class Speed:
    def __init__(self, read, write):
        self.read, self.write = read, write


def on_disks(monkeypatch, numbers):
    """Has directories be on disks of these numbers, by their names."""
    real = Path.stat

    def moved(self, **more):
        found = real(self, **more)
        return os.stat_result((*found[:2], numbers[self.name], *found[3:])) if self.name in numbers else found

    monkeypatch.setattr(Path, "stat", moved)


def measured(monkeypatch, speeds):
    """Has directories be as fast as `speeds` says by their names."""
    monkeypatch.setattr(_core, "measure_disk", lambda directory, nbytes, seconds: speeds[directory.name])


def train(config, steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    engine, *_ = zeroxide.initialize(model=model, config=config, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = engine(torch.ones(4, 256)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return engine, losses


def config_of(path, *more):
    home = {"device": "nvme", "nvme_path": str(path)}
    zero = {"stage": 3, "offload_optimizer": home, "offload_param": home}
    # Tiles of 32 KiB, so that the model has a few hundred.
    return {"zero_optimization": zero, "zeroxide": {"disks": list(map(str, more)), "tile_bytes": 32 << 10}}


def held(directory):
    """Bytes of the one run's file in a directory."""
    return sum(each.stat().st_size for each in directory.rglob("*") if each.stat().st_size > 64 << 10)


def test_disks_get_parts_by_their_measured_speed(tmp_path, monkeypatch, caplog):
    """Catches: a directory that gets nothing or an equal part, the speeds of reading or writing alone taken for both,
    and values that come from another place than they went to."""
    # As much read as written: 300 MB/s, where either alone would say 200 or 600, and 100 MB/s.
    measured(monkeypatch, {"a": Speed(6e8, 2e8), "b": Speed(1e8, 1e8)})
    on_disks(monkeypatch, {"a": 1, "b": 2})
    (tmp_path / "a").mkdir()
    with caplog.at_level(logging.INFO, "zeroxide"):
        engine, losses = train(config_of(tmp_path / "a", tmp_path / "b"))
    assert f"{tmp_path / 'a'} 300 MB/s, 75 %" in caplog.text
    first, second = held(tmp_path / "a"), held(tmp_path / "b")
    # A tile more or less.
    assert abs(first - 3 * second) <= 4 * (64 << 10)
    assert second > 1 << 19
    engine.destroy()
    assert held(tmp_path / "a") == 0
    assert not (tmp_path / "b").exists(), "what the engine has made goes with it"
    (tmp_path / "c").mkdir()
    engine, alone = train(config_of(tmp_path / "c"))
    engine.destroy()
    assert losses == alone


def test_one_disk_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(_core, "measure_disk", None)
    engine, _ = train(config_of(tmp_path, tmp_path), steps=1)
    engine.destroy()


def test_directories_of_one_disk_get_equal_parts_unmeasured(tmp_path, monkeypatch):
    """Two measurements of one disk differ by chance, and so would the parts."""
    monkeypatch.setattr(_core, "measure_disk", None)
    assert disks.measured_shares([tmp_path / "a", tmp_path / "b", tmp_path]) == [1, 1, 1]
    assert [*tmp_path.iterdir()] == []


def test_directories_of_one_disk_share_what_it_does(tmp_path, monkeypatch):
    """The disk of two is measured once, by the first of them: its 400 MB/s are 200 for each."""
    measured(monkeypatch, {"a": Speed(4e8, 4e8), "c": Speed(1e8, 1e8)})
    on_disks(monkeypatch, {"a": 1, "b": 1, "c": 2})
    assert disks.measured_shares([tmp_path / name for name in "abc"]) == [200, 200, 100]


def test_disks_are_measured_by_what_they_do(tmp_path, monkeypatch):
    on_disks(monkeypatch, {"a": 1, "b": 2})
    shares = disks.measured_shares([tmp_path / "a", tmp_path / "b"])
    assert len(shares) == 2
    assert min(shares) > 1
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_is_refused_or_said(tmp_path):
    with pytest.raises(StorageError, match=r"no/such: No such file or directory: what is on disk is to be dealt out"):
        train(config_of(tmp_path, tmp_path / "no/such"))
    assert [*tmp_path.iterdir()] == []


def test_disks_without_anything_on_disk_have_no_effect(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "zeroxide"):
        engine, _ = train({"zeroxide": {"disks": [str(tmp_path)]}}, steps=1)
    engine.destroy()
    assert "zeroxide.disks has no effect: nothing of this model is at home on disk" in caplog.text
    assert load({"zeroxide": {"disks": [str(tmp_path)]}}).zeroxide.disks == (tmp_path,)
