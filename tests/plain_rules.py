"""Optimizer rules in double precision, and a model whose gradients are what it is given, whatever its weights are."""

import torch
from torch import nn

UNIT = 2.0**-24
"""The largest relative error of one rounding to fp32."""


class Given(nn.Module):
    """Its loss is the scalar product of all weights with `steps[at]`: that is each weight's gradient, in any dtype.

    steps: small multiples of 1/64, which bf16 holds exactly, and so do means over ranks that all have the same.
    """

    def __init__(self, names=("first", "second", "third"), numel=731, layers=2):
        super().__init__()
        self.names = names
        self.layers = nn.ModuleList(nn.ParameterDict() for _ in range(layers))
        for number, layer in enumerate(self.layers):
            for position, name in enumerate(names):
                generator = torch.Generator().manual_seed(10 * number + position)
                layer[name] = nn.Parameter(0.05 * torch.randn(numel, generator=generator))

    def forward(self, at):
        total = 0.0
        for number, layer in enumerate(self.layers):
            for position, name in enumerate(self.names):
                weight = layer[name]
                total = total + (weight * gradient(number, position, at, weight.numel()).to(weight.dtype)).sum()
        return total


def gradient(layer, position, at, numel):
    """What one weight's gradient is in step `at`: of one sign over all steps, so that no sum of them cancels."""
    index = torch.arange(numel)
    size = (index * (7 + position) + 3 * layer) % 29 + 1 + at % 3
    return (size / 64.0) * torch.where(index % 2 == 0, 1.0, -1.0)


def lion(weight, gradients, lr, betas, weight_decay):
    """Chen et al. 2023, algorithm 2: weight and momentum after the steps, and a bound of an fp32 weight's error."""
    p, m, error = weight.double(), torch.zeros(weight.shape, dtype=torch.float64), 0.0
    for g in (each.double() for each in gradients):
        direction = betas[0] * m + (1 - betas[0]) * g
        p = p - lr * (direction.sign() + weight_decay * p)
        m = betas[1] * m + (1 - betas[1]) * g
        # Two constants, a product and a sum for the change, and one rounding of the new weight.
        error = error + UNIT * (p.abs() + 4 * lr * (1 + weight_decay * p.abs()))
    return p, {"exp_avg": m}, error


def of_torch(kind, weight, gradients, **hyperparameters):
    """What torch makes of the same in double precision: weight, state, and a bound of an fp32 weight's error."""
    p = nn.Parameter(weight.double())
    optimizer = kind([p], **hyperparameters)
    error = torch.zeros(weight.shape, dtype=torch.float64)
    for number, each in enumerate(gradients, 1):
        before = p.detach().clone()
        p.grad = each.double()
        optimizer.step()
        # At most 16 roundings in an update (see the tests of the kernels), and those that its state carries along.
        error += UNIT * (p.detach().abs() + 16 * number * (p.detach() - before).abs())
    state = {name: value for name, value in optimizer.state[p].items() if name != "step" and value is not None}
    return p.detach(), state, error
