"""Checkpoints of models whose matrices are cut: in the model's own layout, for any number of tensor ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_ranks
from safetensors.torch import load_file

from zeroxide.checkpoint.convert.portable import read_own
from zeroxide.checkpoint.format.manifest import VERSION

PROGRAM = Path(__file__).with_name("tensor_checkpoint_program.py")


def succeed(world: int, *args: Any) -> None:
    for result in run_ranks(world, PROGRAM, [str(each) for each in args], timeout=150):
        assert result.code == 0, result.err[-3000:]


def put_together(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the manifest's word and the reference library alone."""
    manifest = json.loads((path / "manifest.json").read_text())
    files = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    found = {}
    for param in manifest["parameters"]:
        for part, pieces in {"weights": param["weights"], **param["state"]}.items():
            full = torch.full(param["shape"], float("nan"))
            for cut in {json.dumps(piece.get("region")): piece.get("region") for piece in pieces}.values():
                own = [piece for piece in pieces if piece.get("region") == cut]
                flat = torch.cat([files[piece["file"]][piece["key"]].flatten() for piece in own])
                if cut is None:
                    full.view(-1).copy_(flat)
                    continue
                indices = torch.cat([torch.arange(first, first + count) for first, count in cut["segments"]])
                shape = list(full.shape)
                shape[cut["dim"]] = len(indices)
                full.index_copy_(cut["dim"], indices, flat.view(shape))
            found[f"{param['names'][0]} {part}"] = full
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "ways"), [("gpt2", ["2-1", "1-3"]), ("uneven", ["1-0"])])
def test_what_two_tensor_ranks_save_loads_over_any(tmp_path, family, ways):
    """Catches: a matrix saved as its part, parts put together in the wrong order or along the wrong dimension, fused
    weights of which the queries of one rank become keys, what is not cut saved twice or by nobody, moments that stay
    with their rank."""
    succeed(2, "save", tmp_path, family)
    found = torch.load(tmp_path / "found.pt")
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["version"] == VERSION
    for name, each in put_together(tmp_path / "cut").items():
        assert torch.equal(each, found["state"][name]), name
    portable = read_own(tmp_path / "cut", moments=True)
    for param in portable.parameters:
        values = torch.cat([each.clone() for each in portable.segments[param.names[0], "exp_avg"]])
        assert torch.equal(values.view(param.shape), found["state"][f"{param.names[0]} exp_avg"])
    exported = load_file(tmp_path / "model" / "model.safetensors")
    for name, each in exported.items():
        assert torch.equal(each, found["dict"][name]), name
    succeed(2, "load", tmp_path, family, *ways)
    # Where nothing is cut, manifests say nothing of parts.
    plain = json.loads((tmp_path / next(way for way in ways if way[0] == "1") / "manifest.json").read_text())
    assert "segments" not in json.dumps(plain)


@pytest.mark.timeout(300)
def test_four_ranks_load_what_two_tensor_ranks_saved(tmp_path):
    """As two replicas, as one of four parts, and as plain data parallelism."""
    succeed(2, "save", tmp_path, "gpt2")
    found = torch.load(tmp_path / "found.pt")
    # Four ranks take other batches: what they lose next is theirs.
    torch.save({**found, "loss": None}, tmp_path / "found.pt")
    succeed(4, "load", tmp_path, "gpt2", "4-1", "1-2")
