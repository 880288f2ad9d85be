"""torch.func over an engine's module: plain results at stages 0 to 2, refused with its own reason at stage 3."""

from __future__ import annotations

import copy

import pytest
import torch
from running import started
from torch import nn
from torch.func import functional_call, grad

from zeroxide.errors import ModelError

CONFIG = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "gradient_clipping": 0, "zeroxide": {"threads": 1}}
X = torch.ones(2, 4)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def of_weights(module, values):
    return grad(lambda given: functional_call(module, given, (X,)).sum())(values)


def of_input(module):
    return grad(lambda x: module(x).sum())(X)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_those_of_the_plain_model_and_land_nowhere(stage):
    """Catches: a refusal as double backward, which these transforms look like from inside a hook; and gradients of a
    transform that the next step would use, which would change its norm."""
    plain = model()
    values = {name: param.detach().clone() for name, param in plain.named_parameters()}
    with started(model(), config=CONFIG | {"zero_optimization": {"stage": stage}}) as engine:
        if stage == 3:
            for transform in (lambda: of_weights(engine.module, values), lambda: of_input(engine.module)):
                with pytest.raises(ModelError, match=r"torch\.func over an engine's module at stage 3"):
                    transform()
        else:
            expected = of_weights(plain, values)
            assert all(torch.equal(found, expected[name]) for name, found in of_weights(engine.module, values).items())
            assert torch.equal(of_input(engine.module), of_input(plain))
        engine.backward(engine(X).sum())
        engine.step()
        assert engine.was_step_applied()
        norm = engine.get_global_grad_norm().item()
        other = copy.deepcopy(plain).double()
        other(X.double()).sum().backward()
        exact = torch.cat([param.grad.flatten() for param in other.parameters()]).norm().item()
        # Fewer than 64 roundings of 2^-24 in each gradient.
        assert norm == pytest.approx(exact, rel=64 * 2.0**-24)
