"""Checkpoints of others, where one of ours should be: each is named by its format."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from running import Mode, config_of, started
from torch import nn

from zeroxide.checkpoint.convert.convert import convert
from zeroxide.errors import CheckpointError


def distributed(directory):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=directory, no_dist=True)


def universal(directory):
    (directory / "zero" / "out.weight").mkdir(parents=True)
    torch.save({"param": torch.ones(2)}, directory / "zero" / "out.weight" / "fp32.pt")
    torch.save({"module": {}}, directory / "mp_rank_00_model_states.pt")


def sharded(directory):
    directory.mkdir()
    torch.save({"optimizer_state_dict": {}}, directory / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


FORMATS = {
    "fsdp2": (distributed, r"is a checkpoint of torch\.distributed\.checkpoint, as FSDP2 saves: .*dcp_to_torch_save"),
    "universal": (universal, r"is a universal checkpoint of DeepSpeed: .*zeroxide convert"),
    "zero": (sharded, r"is a checkpoint of DeepSpeed: zeroxide convert makes"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("where", ["itself", "tag", "latest", "below"])
def test_a_checkpoint_of_others_is_named(kind, where, tmp_path):
    make, line = FORMATS[kind]
    if where != "itself":
        (tmp_path / "c").mkdir()
    make(tmp_path / "c" if where == "itself" else tmp_path / "c" / "step")
    if where == "latest":
        (tmp_path / "c" / "latest").write_text("step")
    with (
        started(nn.Linear(2, 2), config=config_of(Mode(), tmp_path, "fp32")) as engine,
        pytest.raises(CheckpointError, match=line) as caught,
    ):
        engine.load_checkpoint(tmp_path / "c", tag="step" if where == "tag" else None)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "c") in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fsdp2"])
def test_what_cannot_be_converted_is_named(kind, tmp_path):
    make, line = FORMATS[kind]
    make(tmp_path / "c")
    with pytest.raises(CheckpointError, match=line):
        convert(tmp_path / "c", tmp_path / "out", None, None, include_frozen=True)


def test_a_file_without_the_state_that_its_name_promises(tmp_path):
    torch.save({"model": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="has no optimizer_state_dict, so it is not of DeepSpeed's ZeRO stages"):
        convert(tmp_path, tmp_path / "out", None, None, include_frozen=True)


@pytest.mark.parametrize("background", [False, True])
def test_stats_count_every_byte_of_state(background, tmp_path):
    """Oracle: the elements of the model, at 12 bytes each in fp32. Catches: a count that leaves out the last chunk."""
    model = nn.Sequential(nn.Linear(300, 7), nn.Linear(7, 3))
    config = config_of(Mode(), tmp_path, "fp32")
    config["zeroxide"] |= {"checkpoint_background": background}
    with started(model, config=config) as engine:
        engine.backward(engine(torch.rand(2, 300)).sum())
        engine.step()
        for _ in range(2):
            engine.save_checkpoint(tmp_path / "out")
        engine.wait_for_checkpoint()
        assert engine.checkpoint_stats()["bytes"] == 2 * 12 * (300 * 7 + 7 + 7 * 3 + 3)
