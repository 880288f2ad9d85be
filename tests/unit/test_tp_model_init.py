"""`tp_model_init` notes what it is told; `initialize` compares it with its config."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.errors import ConfigError


def test_the_model_is_returned_as_it_is():
    model = nn.Linear(4, 4)
    before = model.weight
    assert zeroxide.tp_model_init(model, 2, torch.float32) is model
    assert model.weight is before
    assert before.shape == (4, 4)
    # On a single rank there is nobody to share with.
    with pytest.raises(ConfigError, match="tp 2 does not divide the 1 ranks"):
        zeroxide.initialize(model=model, lr=1e-3)


@pytest.mark.parametrize(
    ("told", "config", "line"),
    [
        (
            {"tp_size": 2},
            {"tensor_parallel": {"autotp_size": 4}},
            "told tp_size = 2, and tensor_parallel.autotp_size is 4",
        ),
        ({"tp_size": 2}, {"tensor_parallel": {"tp": {"tp_size": 3}}}, "told tp_size = 2, and"),
        ({"tp_size": 1, "dtype": torch.bfloat16}, {}, "told torch.bfloat16, and the config trains in torch.float32"),
        ({"tp_size": 1, "config": {"tensor_parallel": {"preset": "x"}}}, {}, 'unknown key "tensor_parallel.preset"'),
    ],
)
def test_a_contradiction_is_refused(tmp_path, told, config, line):
    """Catches: a config that is changed where it says otherwise, and one in a file that is not read."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for given in (config, str(path)):
        model = zeroxide.tp_model_init(nn.Linear(4, 4), **{"dtype": None, **told})
        with pytest.raises(ConfigError, match=line):
            zeroxide.initialize(model=model, config=given, lr=1e-3)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"tp_size": 0}, "tp_size: expected an integer from 1, got 0"),
        ({"tp_size": True}, "tp_size: expected an integer from 1, got True"),
        ({"dtype": "bf16"}, "dtype: expected a dtype of torch or None, got 'bf16'"),
        ({"tp_group": object()}, "tp_group: groups of one's own are not built"),
    ],
)
def test_what_is_no_size_is_refused(more, line):
    with pytest.raises(ConfigError, match=line):
        zeroxide.tp_model_init(**{"model": nn.Linear(2, 2), "tp_size": 2, "dtype": None, **more})
