"""Experts spread over ranks: real processes against plain PyTorch in one, and against one another bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import build, train_plain
from launching import run_ranks
from safetensors.torch import load_file

HERE = Path(__file__).parent


def run_cases(world: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By the name of a case, what each rank found."""
    job = folder / "cases.json"
    job.write_text(json.dumps([{"family": "moe", "stage": 3, **case} for case in cases]))
    results = run_ranks(world, HERE / "expert_ranks.py", [str(job)], env={"PYTHONPATH": paths()}, timeout=280)
    found: dict[str, list[dict[str, Any]]] = {case["name"]: [] for case in cases}
    for result in results:
        assert result.code == 0, result.err
        for line in result.out.splitlines():
            if line.startswith("CASE "):
                one = json.loads(line.removeprefix("CASE "))
                found[one["name"]].append(one)
    return found


def paths() -> str:
    from launching import PACKAGE, TESTS

    return f"{PACKAGE}:{TESTS}:{HERE}"


def close_to_plain(found: list[dict[str, Any]], weights: dict[str, torch.Tensor], family: str, steps: int) -> None:
    """Losses within 2e-6 of each other. Sums of fp32 in another order: an update of AdamW of a gradient near zero may
    go the other way, which is at most 2 * lr a step, for few elements; most stay within 2e-5."""
    losses, norms, expected = train_plain(family, len(found), steps)
    for rank, one in enumerate(found):
        assert one["losses"] == pytest.approx(losses[rank], rel=2e-6)
        assert one["norms"] == pytest.approx(norms, rel=2e-6)
    assert sorted(weights) == sorted(expected)
    for name, value in expected.items():
        assert weights[name].shape == value.shape, name
        far = (weights[name] - value).abs() > 2e-5
        assert far.float().mean() < 0.01, name
        assert float((weights[name] - value).abs().max()) <= 2 * 1e-2 * steps, name


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cases = [
        {"name": "stage 3", "ep": 2, "save": "three"},
        {"name": "stage 2", "ep": 2, "stage": 2, "refused": True},
        {"name": "stage 1", "ep": 2, "stage": 1},
        {"name": "stage 0", "ep": 2, "stage": 0},
        {"name": "nvme", "ep": 2, "nvme": True},
        {"name": "state on nvme", "ep": 2, "stage": 2, "nvme": True},
        {"name": "bf16", "ep": 2, "dtype": "bf16"},
        {"name": "bf16, stage 1", "ep": 2, "dtype": "bf16", "stage": 1},
        {"name": "bf16, nvme", "ep": 2, "dtype": "bf16", "nvme": True},
        {"name": "dense", "ep": 1, "save": "dense"},
        {"name": "on from three", "ep": 2, "load": "three", "first": 3, "steps": 1, "stage": 1},
        {"name": "dense from three", "ep": 1, "load": "three", "first": 3, "steps": 1},
        {"name": "four steps", "ep": 2, "steps": 4},
        {"name": "three from dense", "ep": 2, "load": "dense", "first": 3, "steps": 1},
    ]
    return folder, run_cases(2, folder, cases)


def test_two_ranks_train_as_one_process_does(two):
    """Catches: experts averaged over the ranks that have them instead of over all, tokens that come back in another
    order, a norm that counts an expert twice, gates whose gradient stays out."""
    folder, found = two
    close_to_plain(found["stage 3"], torch.load(folder / "stage 3.pt"), "moe", 3)
    # A rank has half of the experts.
    experts = [unit for unit in found["stage 3"][0]["units"] if unit.endswith("(experts)")]
    assert len(experts) == 2
    assert found["stage 3"][0]["units"] == found["stage 3"][1]["units"]
    assert found["stage 3"][0]["held"] < found["dense"][0]["held"]


def test_stages_and_homes_have_the_same_bits(two):
    """Catches: a scale that is left out where a rank alone has an expert, a stage that keeps shards of it."""
    _, found = two
    first = found["stage 3"]
    for name in ("stage 2", "stage 1", "stage 0", "nvme", "state on nvme"):
        for mine, theirs in zip(found[name], first, strict=True):
            assert [mine[key] for key in ("losses", "norms", "shown")] == [
                theirs[key] for key in ("losses", "norms", "shown")
            ], name
        assert found[name][0]["model"] == first[0]["model"], name
    for name in ("bf16, stage 1", "bf16, nvme"):
        assert found[name][0]["model"] == found["bf16"][0]["model"], name
        assert found[name][0]["norms"] == found["bf16"][0]["norms"], name


def test_what_would_take_one_ranks_experts_for_all_is_refused(two):
    """Catches: rank 0's expert written over those of the others."""
    _, found = two
    for one in found["stage 2"]:
        gathered, loaded = one["refused"]
        assert "is an expert's, and ranks have different experts" in gathered
        assert "has experts that are spread over ranks, which is not built" in loaded
        assert "\n" not in gathered + loaded


def test_experts_that_do_not_divide_are_refused_on_every_rank(tmp_path):
    (tmp_path / "cases.json").write_text(json.dumps([{"family": "mixtral", "name": "three", "ep": 3, "stage": 3}]))
    results = run_ranks(3, HERE / "expert_ranks.py", [str(tmp_path / "cases.json")], env={"PYTHONPATH": paths()})
    for result in results:
        assert result.code == 1
        assert "has 4 experts, which 3 ranks cannot share alike" in result.err


def test_the_state_dict_is_that_of_the_whole_model_on_every_rank(two):
    """Catches: a dict with one rank's experts, or another's under its names."""
    _, found = two
    for rank in range(2):
        assert found["stage 3"][rank]["shown"] == found["stage 3"][0]["model"]
    assert found["stage 3"][0]["names"] == sorted(build("moe", 1).state_dict())


def test_a_checkpoint_goes_on_with_experts_spread_or_not(two):
    """Catches: the experts of rank 0 in the place of another's, moments that stay behind."""
    _, found = two
    assert found["on from three"][0]["model"] == found["four steps"][0]["model"]
    for name in ("dense from three", "three from dense"):
        assert found[name][0]["losses"] == pytest.approx(found["four steps"][0]["losses"][-2:], rel=2e-6)


def test_the_exported_model_has_all_experts(two):
    folder, _ = two
    exported = load_file(folder / "three.model" / "model.safetensors")
    expected = torch.load(folder / "stage 3.pt")
    assert sorted(exported) == sorted(expected)
    assert all(torch.equal(exported[name].float(), expected[name]) for name in expected)


def test_four_ranks_with_two_and_four_places(tmp_path):
    """Catches: groups of ranks that have other experts, shards of experts cut for all ranks."""
    cases = [
        {"name": "ep 2", "ep": 2},
        {"name": "ep 4", "ep": 4},
        {"name": "ep 2, stage 1", "ep": 2, "stage": 1},
        {"name": "ep 2, hybrid", "ep": 2, "own": {"mesh": {"dp_replicate": 2, "dp_shard": 2}}},
        {"name": "ep 2, nvme", "ep": 2, "nvme": True},
    ]
    found = run_cases(4, tmp_path, cases)
    for name in ("ep 2", "ep 4"):
        close_to_plain(found[name], torch.load(tmp_path / f"{name}.pt"), "moe", 3)
    for name in ("ep 2, stage 1", "ep 2, nvme"):
        assert found[name][0]["model"] == found["ep 2"][0]["model"], name
        assert found[name][0]["norms"] == found["ep 2"][0]["norms"], name
    assert found["ep 2, hybrid"][0]["model"] == found["ep 2"][0]["model"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_models_of_hugging_face_are_spread_in_place(tmp_path, family):
    """Catches: rows of another expert, shared experts and routers that are not trained, a parameter that is saved as
    one rank has it."""
    cases = [
        {"name": "spread", "ep": 2, "save": "spread"},
        {"name": "stage 1", "ep": 2, "stage": 1},
        {"name": "recomputes", "ep": 2, "recomputes": True},
        {"name": "not spread", "ep": 1, "load": "spread", "first": 3, "steps": 1},
        {"name": "spread again", "ep": 2, "load": "spread", "first": 3, "steps": 1},
    ]
    found = run_cases(2, tmp_path, [{"family": family, **case} for case in cases])
    weights = torch.load(tmp_path / "spread.pt")
    close_to_plain(found["spread"], weights, family, 3)
    assert found["spread"][0]["model"] == found["stage 1"][0]["model"] == found["recomputes"][0]["model"]
    assert found["spread"][0]["shown"] == found["spread"][1]["shown"] == found["spread"][0]["model"]
    before = build(family, 1).state_dict()
    assert all(not torch.equal(weights[name], value) for name, value in before.items() if value.dim() > 1)
    again, not_spread = found["spread again"][0]["losses"], found["not spread"][0]["losses"]
    assert again == pytest.approx(not_spread, rel=2e-6)
    exported = load_file(tmp_path / "spread.model" / "model.safetensors")
    assert all(torch.equal(exported[name].float(), weights[name]) for name in exported)


def test_fused_experts_of_four_ranks(tmp_path):
    found = run_cases(
        4, tmp_path, [{"family": "mixtral", "name": "ep 4", "ep": 4}, {"family": "mixtral", "name": "ep 2", "ep": 2}]
    )
    for name in ("ep 2", "ep 4"):
        close_to_plain(found[name], torch.load(tmp_path / f"{name}.pt"), "mixtral", 3)
