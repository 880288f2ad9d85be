"""The hook that takes a parameter's gradient to the core."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.errors import ModelError
from zeroxide.zero.passes import GradientState


def test_a_gradient_that_comes_after_its_unit_has_been_sent_is_refused():
    """Catches: a gradient that is added to what other ranks have had."""
    engine, *_ = zeroxide.initialize(model=nn.Linear(3, 2), lr=0.1, config={"zero_optimization": {"stage": 0}})
    try:
        reducer = engine.parts.hooks.reducer
        (unit,) = reducer.units
        loss = engine(torch.ones(1, 3)).sum()
        engine.parts.hooks.begin_backward()
        unit.gradients = GradientState.SENT
        with pytest.raises(ModelError, match="arrived after the unit had been reduced over the ranks"):
            loss.backward()
    finally:
        engine.destroy()
