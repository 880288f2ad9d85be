"""`zeroxide plan`'s options in which backward updates: where there are some, and what they come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli_plan import by_name, machine, planned

from zeroxide.cli.planning.measured import Measurements, cache_file, machine_key
from zeroxide.cli.planning.work import threads_of

pytest.importorskip("transformers")

__all__ = ["machine"]

WORDS = ("gpt2", "--batch", "1", "--sequence", "64")


def asked(folder: Path, capsys: Any, config: dict[str, Any], *words: str) -> dict[str, Any]:
    """The options of a plan with that config beside bf16, by their names."""
    path = folder.parent / "config.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, **config}))
    return by_name(planned(capsys, *WORDS, "--disk", str(folder), "--config", str(path), *words))


def early(found: dict[str, Any]) -> set[str]:
    return {name.partition(",")[0] for name in found if ", early" in name}


@pytest.mark.parametrize(
    ("config", "words", "homes"),
    [
        ({}, (), {"nvme"}),
        ({"gradient_clipping": 0}, (), {"cpu", "mixed", "nvme"}),
        ({"gradient_clipping": 0, "zeroxide": {"update_in_backward": False}}, (), set()),
        ({"zeroxide": {"update_in_backward": "adaptive"}}, (), {"nvme"}),
        ({"gradient_clipping": 0, "zeroxide": {"row_bytes": "8MiB"}}, (), set()),
        ({"gradient_clipping": 0}, ("--ranks", "2"), set()),
        ({"gradient_clipping": 0}, ("--device-memory", "1GiB"), set()),
    ],
    ids=["clips", "never clips", "never", "adaptive", "rows", "ranks", "device"],
)
def test_they_are_there_where_an_engine_would_take_them(config, words, homes, machine, capsys):
    """Catches: an option that the engine refuses, and one that it would take and that is not shown."""
    found = asked(machine, capsys, config, *words)
    assert early(found) == homes
    assert any(", early" not in name for name in found)


def test_an_explicit_true_leaves_no_other_where_it_can_be(machine, capsys):
    found = asked(machine, capsys, {"zeroxide": {"update_in_backward": True}})
    assert {name.partition(",")[0] for name in found if ", early" not in name} == {"cpu", "mixed"}
    assert early(found) == {"nvme"}


def test_without_a_norm_gradients_take_memory_for_two_units(machine, capsys):
    found = asked(machine, capsys, {"gradient_clipping": 0})
    usual, soon = found["cpu, split"], found["cpu, split, early"]
    # GPT-2's embedding is held through backward, 50257 x 768 of it; of twelve blocks two have room.
    assert usual["buckets"]["gradients"] > 2 * 124e6
    assert 2 * 38e6 < soon["buckets"]["gradients"] < 2 * 60e6
    assert soon["process"] < usual["process"]


def test_steps_that_clip_are_redone_in_bytes_and_time(machine, capsys):
    """Nothing, all or half of the steps clip. Catches: a share that is not counted, or counted twice."""
    never, half, all_ = (
        asked(machine, capsys, {"zeroxide": {}}, "--clipped-steps", share)["nvme, split, early"]
        for share in ("0", "0.5", "1")
    )
    usual = asked(machine, capsys, {})["nvme, split"]
    assert never["read"] < usual["read"]
    for name in ("read", "written"):
        assert half[name] == pytest.approx((never[name] + all_[name]) / 2, abs=1)
    # 2 bytes of weights and 10 of state a parameter, or so, a second time.
    assert all_["written"] - never["written"] == pytest.approx(12 * 124.4e6, rel=0.03)
    assert 0 < all_["read"] - never["read"] - (all_["written"] - never["written"]) < 2.1 * 124.4e6
    # Waiting for the norm leaves the disk idle in backward, so that a second update takes no longer than a late one.
    assert never["phases"]["update"] < 0.1 * usual["phases"]["update"]
    assert all_["phases"]["update"] == pytest.approx(usual["phases"]["update"], rel=0.05)
    assert half["phases"]["total"] == pytest.approx((never["phases"]["total"] + all_["phases"]["total"]) / 2, rel=0.01)
    # A second place of all but gradients.
    assert never["disk_bytes"] > 1.8 * usual["disk_bytes"]


def test_the_cheaper_of_waiting_and_speculating_is_recommended(machine, capsys):
    """On a disk that all waits for. Catches: an order that does not see what clips."""
    found = Measurements.load(cache_file(), machine_key(threads_of({})))
    assert found.disks[str(machine)].update == 1e8
    words = (*WORDS, "--disk", str(machine), "--host-memory", "560MiB")
    rare, often = (planned(capsys, *words, "--clipped-steps", share) for share in ("0.01", "0.9"))
    assert ", early" in rare["recommended"]
    assert rare["run"].endswith(" --update-in-backward always") or '"update_in_backward": true' in rare["run"]
    assert ", early" not in often["recommended"]
    assert "update" not in often["run"]
