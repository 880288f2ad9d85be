"""What the core is told of a tensor's memory: by torch's exchange functions where it is an ordinary tensor, else by its
attributes. The core's checksum of the memory is compared with that of the values.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide import _core
from zeroxide.device.placement import plain, spec, to_host
from zeroxide.errors import ModelError
from zeroxide.precision.bits import converted


class Subclass(torch.Tensor):
    """Not exactly a tensor: its attributes are asked."""


GRID = torch.arange(24, dtype=torch.uint8).view(4, 6)

CONTIGUOUS = {
    "matrix": GRID,
    "rows": GRID[1:3],
    "one row": GRID[2],
    "scalar": GRID[2, 3],
    "odd stride of one": GRID[:, :1].clone().as_strided((4, 1), (1, 7)),
    "odd stride of no element": GRID[:0].as_strided((0, 3), (1, 9)),
    "no element": torch.empty(0, dtype=torch.uint8),
}


@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter, Subclass], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", CONTIGUOUS)
def test_the_memory_is_that_of_the_values(name, kind):
    """Catches: an offset that is left out, and a stride of one element that is taken for a gap."""
    tensor = CONTIGUOUS[name]
    expected = _core.checksum(spec(torch.tensor(tensor.flatten().tolist(), dtype=torch.uint8)))
    if kind is nn.Parameter:
        tensor = nn.Parameter(tensor, requires_grad=False)
    elif kind is Subclass:
        tensor = tensor.as_subclass(Subclass)
    assert _core.checksum(spec(tensor)) == expected


REFUSED = {
    "columns": (GRID.t(), r"got torch.uint8 \(6, 4\) on cpu with strides \(1, 6\)"),
    "every other": (GRID[:, ::2], r"strides \(6, 2\)"),
    "expanded": (GRID[:1].expand(4, 6), r"strides \(0, 1\)"),
    "dtype": (GRID.to(torch.int32), "got torch.int32"),
    "complex": (torch.zeros(2, dtype=torch.complex64), "got torch.complex64"),
    "meta": (torch.zeros(2, device="meta"), "on meta"),
    "sparse": (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
    "negative": (torch._neg_view(torch.ones(2)), r"its negative bit set: resolve_neg\(\) first"),
}


@pytest.mark.parametrize("subclass", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_run_of_values_is_refused(name, subclass):
    """Catches: a gap that is read over, and the opposite of a value that is taken for it."""
    tensor, line = REFUSED[name]
    if subclass and tensor.layout is not torch.strided:
        pytest.skip("torch makes no subclass of a sparse tensor")
    with pytest.raises(ModelError, match=line):
        spec(tensor.as_subclass(Subclass) if subclass else tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
@pytest.mark.parametrize("kind", [torch.Tensor, Subclass], ids=lambda kind: kind.__name__)
def test_dtypes_are_told_apart(dtype, kind):
    """Catches: two dtypes of one width that are confused. The core takes bytes alone for a checksum."""
    described = spec(torch.zeros(4, dtype=dtype).as_subclass(kind))
    name = str(dtype).removeprefix("torch.")
    if dtype is torch.uint8:
        _core.checksum(described)
        return
    with pytest.raises(ValueError, match=f"expected a uint8 tensor, got {name}"):
        _core.checksum(described)


def test_values_that_torch_negates_by_a_bit_become_plain():
    negated = torch._neg_view(torch.tensor([1.0, -2.5]))
    for found in (plain(negated), to_host(negated), converted(negated, torch.bfloat16)):
        assert not found.is_neg()
        assert found.tolist() == [-1.0, 2.5]
    whole = torch.ones(3)
    assert plain(whole) is whole


class _Negated(torch.autograd.Function):
    """Hands its gradient back negated, as torch does it where it can: by a bit of the tensor."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch._neg_view(grad.clone())


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, inputs):
        return (_Negated.apply(self.weight) * inputs).sum()


def test_a_gradient_that_torch_negates_by_a_bit_has_its_sign():
    """Catches: memory that is taken for the values. The gradient is -1 everywhere, and lr 0.5 adds 0.5."""
    engine, *_ = zeroxide.initialize(
        model=_Model(),
        config={
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "gradient_clipping": 0,
            "zero_optimization": {"stage": 3},
        },
    )
    try:
        engine.backward(engine(torch.ones(8)))
        engine.step()
        assert engine.module_state_dict()["weight"].tolist() == [1.5] * 8
    finally:
        engine.destroy()


def test_an_optimizer_takes_a_gradient_that_torch_negates_by_a_bit():
    """Lion moves against the sign of the gradient alone: 1 + lr."""
    weight = nn.Parameter(torch.ones(8))
    weight.grad = torch._neg_view(torch.ones(8))
    optimizer = zeroxide.optim.DeepSpeedCPULion([weight], lr=0.5, weight_decay=0.0)
    optimizer.step()
    assert weight.tolist() == [1.5] * 8
