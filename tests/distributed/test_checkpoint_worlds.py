"""Checkpoints of real ranks: the same bits go on, and every element survives a change of the world size."""

import json
from pathlib import Path

import pytest
from launching import run_ranks
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("checkpoint_program.py")


def succeed(world, *args):
    results = run_ranks(world, PROGRAM, [str(each) for each in args])
    for result in results:
        assert result.code == 0, result.err
    return results


def tensors(path):
    """Every element of a checkpoint by (part, name), put together by the manifest's word and the reference library."""
    manifest = json.loads((path / "manifest.json").read_text())
    files = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    found = {}
    for param in manifest["parameters"]:
        for part in ("weights", "exp_avg", "exp_avg_sq"):
            for piece in param["weights"] if part == "weights" else param["state"].get(part, []):
                values = files[piece["file"]][piece["key"]].flatten().tolist()
                found.setdefault((part, param["names"][0]), []).extend(values)
    return found, manifest


@pytest.mark.parametrize(
    ("stage", "offload", "more"),
    [(0, "none", ()), (1, "cpu", ("background",)), (2, "none", ()), (3, "nvme", ("background",))],
    ids=str,
)
def test_training_goes_on_with_the_same_bits_at_any_world_size(tmp_path, stage, offload, more):
    (tmp_path / "scratch").mkdir()
    home = f"nvme:{tmp_path / 'scratch'}" if offload == "nvme" else offload
    succeed(2, "save", tmp_path / "out", stage, home, *more)
    assert (tmp_path / "out" / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "two" / "model.safetensors"
    ).read_bytes()
    before, manifest = tensors(tmp_path / "out" / "global_step2")
    assert len(manifest["generators"]) == 2
    assert manifest["generators"][0]["torch"] != manifest["generators"][1]["torch"]
    assert {file["name"].split("-")[1] for file in manifest["files"]} == {"rank00000", "rank00001"}
    other_world, other_stage = (3, 3) if stage < 3 else (1, 0)
    succeed(other_world, "copy", tmp_path / "out", other_stage, "none")
    after, again = tensors(tmp_path / "out" / "again" / "tag")
    assert after == before
    for key in ("counters", "groups", "scheduler"):
        assert again[key] == manifest[key], key
