"""Cross entropy on a device with kernels: torch's numbers, nothing of the logits in fp32, and no access unordered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from simulated import engines
from zeroxide.kernels.cross_entropy import FP32_TOLERANCE
from zeroxide.losses import chunked_cross_entropy, linear_cross_entropy

ROWS, FEATURES, WORDS = 9, 8, 300
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Wide(TorchDispatchMode):
    """The largest fp32 tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype is torch.float32:
            self.largest = max(self.largest, found.numel())
        return found


@pytest.fixture(autouse=True)
def with_kernels(sim):
    sim.set_delay(0, 100, seed=3)
    with engines.followed(kernels=True):
        yield
        assert [str(each) for each in sim.races()] == []


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def targets(ignore: int) -> torch.Tensor:
    found = torch.randint(0, WORDS, (ROWS,), generator=torch.Generator().manual_seed(7))
    found[2::4] = ignore
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_the_cross_entropy_of_logits(dtype, strided, reduction):
    """Catches: what is ignored and counts (class 5 has a logit), a gradient unscaled or of the sum of all rows, logits
    that are read as if they were contiguous, fp32 copies of them, torch where there are kernels.

    Kernels compute in fp32 within FP32_TOLERANCE of the largest number; a gradient is rounded once to its dtype.
    """
    logits, target = draw(1, ROWS, WORDS, dtype=dtype) * 4, targets(5)
    there = logits.to("sim")
    if strided:
        there = there.t().contiguous().t()
    there.requires_grad_()
    with Wide() as seen:
        found = chunked_cross_entropy(there, target.to("sim"), 5, reduction)
        seed = torch.linspace(0.5, 2, found.numel()).view(found.shape)
        (mine,) = torch.autograd.grad(found, there, seed.to("sim"))
    assert found.dtype is torch.float32
    assert mine.dtype is dtype
    assert seen.largest < ROWS * WORDS or dtype is torch.float32
    assert [each.startswith("zx_cross_entropy") for each in engines.launched()] == [True, True]
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, target, ignore_index=5, reduction=reduction)
    (other,) = torch.autograd.grad(expected, wide, seed.double())
    largest = expected.abs().max().item()
    assert (found.cpu().double() - expected).abs().max().item() <= ROWS * FP32_TOLERANCE * largest
    bound = UNITS[dtype] * other.abs() + ROWS * FP32_TOLERANCE * other.abs().max()
    if dtype is torch.float16:
        bound += 2.0**-25  # Half of the smallest number of fp16.
    assert ((mine.cpu().double() - other).abs() <= bound).all()


def test_the_backend_torch_launches_nothing():
    """Catches: a backend that is not looked at."""
    logits = draw(1, ROWS, WORDS).to("sim").requires_grad_()
    found = chunked_cross_entropy(logits, targets(5).to("sim"), 5, backend="torch")
    found.backward()
    assert engines.launched() == []
    by_kernels = chunked_cross_entropy(logits, targets(5).to("sim"), 5)
    assert abs(found.item() - by_kernels.item()) <= ROWS * FP32_TOLERANCE * found.item()
    double = chunked_cross_entropy(logits.double(), targets(5).to("sim"), 5)
    assert len(engines.launched()) == 1
    assert abs(found.item() - double.item()) <= ROWS * FP32_TOLERANCE * found.item()


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_the_cross_entropy_of_a_projection(dtype, biased):
    """Catches: a chunk or a bias left out, a target looked for in another chunk, sums of the wrong rows in backward.

    Beside the same by torch in host memory, whose logits of a chunk have the same bits: the losses differ as fp32 sums
    do, and a logit's gradient by u on each side, where u is a rounding to its dtype and what fp32 sums differ by. The
    gradients of a row's logits come to 2/7 in all (7 rows count), so with numbers below 4.5 those of the input differ
    by 2.6 u for that and, summed over 5 chunks each of which is rounded, by 12.9 u: 16 u. The weight has less, the
    bias 4 u.
    """
    columns, given, found = 64, {}, {}
    given["input"], given["weight"] = draw(1, ROWS, FEATURES, dtype=dtype), draw(2, WORDS, FEATURES, dtype=dtype)
    if biased:
        given["bias"] = draw(3, WORDS, dtype=dtype)
    for where in ("cpu", "sim"):
        mine = {name: each.detach().to(where).requires_grad_() for name, each in given.items()}
        target = targets(-100).to(where)
        with Wide() as seen:
            loss = linear_cross_entropy(
                mine["input"], mine["weight"], target, linear_bias=mine.get("bias"), columns=columns
            )
            loss.backward()
        found[where] = loss.item(), {name: each.grad.cpu().double() for name, each in mine.items()}, seen.largest
    # 300 words in chunks of at most 64 are 5.
    assert len(engines.launched()) == 10
    if dtype is not torch.float32:
        assert found["sim"][2] < ROWS * 60 <= found["cpu"][2]
    assert abs(found["sim"][0] - found["cpu"][0]) <= 2 * FP32_TOLERANCE * found["cpu"][0]
    for name, expected in found["cpu"][1].items():
        bound = (4 if name == "bias" else 16) * (UNITS[dtype] + FP32_TOLERANCE)
        got = found["sim"][1][name]
        assert (got - expected).abs().max() <= bound, name
        assert expected.abs().max() > 4 * bound, name


def test_autocast_on_the_device_is_seen():
    """Catches: products in the dtype that autocast has in host memory."""
    hidden, weight = draw(1, ROWS, FEATURES), draw(2, WORDS, FEATURES)
    found = {}
    for where in ("cpu", "sim"):
        mine = weight.detach().clone().to(where).requires_grad_()
        with torch.autocast(where, torch.bfloat16):
            loss = linear_cross_entropy(hidden.to(where), mine, targets(-100).to(where), columns=64)
        loss.backward()
        found[where] = mine.grad.cpu()
    assert {each.rsplit("_", 1)[1] for each in engines.launched()} == {"bf16"}
    assert (found["sim"] - found["cpu"]).abs().max() <= 2.0**-7 * found["cpu"].abs().max()


def test_another_device_than_the_current_one_launches_on_its_own():
    """Catches: kernels launched on torch's current device."""
    logits = draw(1, ROWS, WORDS).to("sim:1").requires_grad_()
    loss = chunked_cross_entropy(logits, targets(5).to("sim:1"), 5)
    loss.backward()
    expected = functional.cross_entropy(logits.detach().cpu().double(), targets(5), ignore_index=5)
    assert abs(loss.item() - expected.item()) <= ROWS * FP32_TOLERANCE * expected.item()
    assert logits.grad is not None
