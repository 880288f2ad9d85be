"""`compute_elastic_config`, against what DeepSpeed 0.18.3 answered (deepspeed/elasticity/elasticity.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zeroxide.errors import ConfigError
from zeroxide.integrations.deepspeed.elasticity import compute_elastic_config, elasticity_enabled

ANSWERS = json.loads((Path(__file__).parent / "elastic_answers.json").read_text())
"""What was asked, and the answer."""


@pytest.mark.parametrize("asked", ANSWERS)
def test_answers_are_deepspeeds(asked):
    """Catches: a number of ranks left out, another multiple, the micro-batch of another size."""
    config = {"elasticity": {"enabled": True, **asked["elasticity"]}}
    batch, ranks, *micro = compute_elastic_config(config, "0.18.3", asked["world_size"], asked["micro_batch"])
    assert [batch, ranks, *micro] == asked["answer"]


def test_a_batch_above_the_limit_is_said(caplog):
    """As DeepSpeed has it: the least common multiple counts. Catches: silence."""
    batch, _ = compute_elastic_config(
        {"elasticity": {"enabled": True, "max_train_batch_size": 100, "micro_batch_sizes": [7, 11, 13], "version": 0.1}}
    )
    assert batch == 1001
    assert "1001 is above max_train_batch_size, 100" in caplog.text


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (None, "no section of that name"),
        ({"enabled": False}, "set enabled to true"),
        ({"max_train_batch_size": 8}, "micro_batch_sizes: required"),
        ({"max_train_batch_size": 8, "micro_batch_sizes": [2, 0]}, "expected a list of integers above 0"),
        ({"max_train_batch_size": 8, "micro_batch_sizes": [16], "version": 0.1}, "16 is above the limit of 8"),
        ({"max_train_batch_size": 8, "micro_batch_sizes": [2], "min_gpus": 3, "max_gpus": 2}, "min_gpus is 3"),
        ({"max_train_batch_size": 8, "micro_batch_sizes": [2], "max_gpus": "4"}, "expected an integer above 0"),
        ({"max_train_batch_size": 8, "micro_batch_sizes": [2], "version": 0.3}, "expected 0.1 or 0.2"),
        ({"max_train_batch_size": 8, "micro_batch_sizes": [2], "version": "x"}, "expected 0.1 or 0.2"),
        ({"max_train_batch_size": "many", "micro_batch_sizes": [2]}, "expected an integer above 0, got 'many'"),
        ({"max_train_batch_size": 8, "micro_batch_sizes": [2], "min_gpu": 1}, "unknown key 'min_gpu'"),
        ({"max_train_batch_size": 8, "micro_batch_sizes": [2], "version": 0.1}, "5 ranks do not divide a batch of 8"),
    ],
)
def test_what_is_refused(section, line):
    config = {} if section is None else {"elasticity": {"enabled": True, **section}}
    assert elasticity_enabled(config) == (section is not None and section.get("enabled", True))
    with pytest.raises(ConfigError, match=line):
        compute_elastic_config(config, "0.18.3", 5)
