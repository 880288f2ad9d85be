"""What scripts for DeepSpeed read from an engine and set on it, beside its methods."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from running import started
from torch import nn

import zeroxide

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}


class Head(nn.Module):
    """A model with attributes as those of Hugging Face have them."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(4, 2)
        self.config = "the model's own"
        self.register_buffer("factor", torch.ones(2))
        self.broken_reads = 0

    @property
    def broken(self):
        self.broken_reads += 1
        return self.no_such_thing

    def generate(self, length):
        return [self.lm_head.out_features] * length

    def forward(self, x):
        return self.lm_head(x) * self.factor

    def __len__(self):
        return 17


def test_the_config_is_the_very_dict_that_was_given():
    config = ADAM | {"zero_optimization": {"stage": 2}}
    before = copy.deepcopy(config)
    model = Head()
    with started(model, config=config) as engine:
        assert engine.config is config
        assert engine.config == before
        assert engine.config["zero_optimization"].get("stage") == 2
        assert engine.config_params == config
        assert model.config == engine.module.config == "the model's own"
        assert engine.resolved_config is not config


def test_the_config_of_a_file_is_what_is_in_it(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("// a comment\n" + json.dumps(ADAM))
    for given in (path, str(path)):
        with started(Head(), config=given) as engine:
            assert engine.config == ADAM
            assert type(engine.config) is dict
    with started(Head(), lr=1e-3) as engine:
        assert engine.config == {}


@pytest.mark.parametrize("stage", [2, 3])
def test_what_the_engine_does_not_have_is_the_module_s(stage):
    model = Head()
    with started(model, config=ADAM | {"zero_optimization": {"stage": stage}}) as engine:
        assert engine.lm_head is model.lm_head
        assert engine.generate(3) == [2, 2, 2]
        assert engine.factor is model.factor
        assert engine.generate.__self__ is model
        assert engine.module is model
        # Set on the engine, it is the engine's, as with DeepSpeed.
        engine.note = 1
        assert not hasattr(model, "note")
        assert not hasattr(engine, "no_such_thing")
        with pytest.raises(AttributeError, match="neither the engine nor its module, a Head, has an attribute 'gone'"):
            _ = engine.gone
        # What Python itself asks of an object is not passed on.
        with pytest.raises(TypeError):
            len(engine)
        assert not hasattr(engine, "__len__")


def test_a_property_that_fails_is_told_once_and_not_looked_for_elsewhere():
    model = Head()
    with started(model, config=ADAM) as engine:
        with pytest.raises(AttributeError, match="'broken'"):
            _ = engine.broken
        assert model.broken_reads == 1
        engine.parts.timers = None
        model.times = "the model's"
        with pytest.raises(AttributeError, match="seconds"):
            engine.times()
        del engine.parts.counters
        model.micro_steps = "the model's"
        with pytest.raises(AttributeError):
            _ = engine.micro_steps


def test_an_engine_that_is_half_made_has_no_endless_look_ups():
    half = zeroxide.Engine.__new__(zeroxide.Engine)
    with pytest.raises(AttributeError):
        _ = half.module
    with pytest.raises(AttributeError):
        _ = half.anything


def test_what_scripts_set_counts(tmp_path):
    """Lightning takes the schedule away from the engine and steps it itself."""
    model = Head()
    config = ADAM | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}}
    with started(model, config=config) as engine:
        schedule, engine.lr_scheduler = engine.lr_scheduler, None
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        assert schedule.last_epoch == 0
        manifest = json.loads((engine.save_checkpoint(tmp_path) / "manifest.json").read_text())
        assert manifest["scheduler"] is None
        engine.lr_scheduler = schedule
        engine.step()
        assert schedule.last_epoch == 0, "nothing had been accumulated"
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        assert schedule.last_epoch == 1
        engine.global_steps = 41
        assert engine.save_checkpoint(tmp_path).name == "global_step41"
