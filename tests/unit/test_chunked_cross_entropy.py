"""Cross entropy of logits a block of rows at a time, beside torch's in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from zeroxide.errors import TensorError
from zeroxide.losses import chunked_cross_entropy

ROWS, WORDS = 21, 37


def given(dtype: torch.dtype, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = (torch.randn(3, ROWS // 3, WORDS) * scale).to(dtype).requires_grad_()
    target = torch.randint(0, WORDS, (3, ROWS // 3))
    target[1, 2:5] = -7
    return logits, target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("block", [1, 4, 100, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_cross_entropy_of_all_rows(dtype, block, reduction):
    """Catches: a block that is left out, targets that are ignored and count, a mean over all, a gradient unscaled.

    The logarithm of a sum of WORDS exponentials of fp32, and its difference to a logit: within (WORDS + 8) u of the
    largest logit. A gradient is a softmax, of which each term has as many roundings, and is rounded to its dtype.
    """
    logits, target = given(dtype)
    found = chunked_cross_entropy(logits, target, -7, reduction, block)
    wide = logits.detach().double().requires_grad_()
    expected = functional.cross_entropy(wide.flatten(0, 1), target.flatten(), ignore_index=-7, reduction=reduction)
    assert found.dtype is torch.float32
    assert found.shape == (target.shape if reduction == "none" else ())
    rows = ROWS if reduction == "sum" else 1
    bound = rows * (WORDS + 8) * 2.0**-24 * wide.abs().max().item()
    assert (found.double().flatten() - expected).abs().max().item() <= bound
    seed = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64)
    (mine,) = torch.autograd.grad(found.flatten(), logits, seed.float())
    (other,) = torch.autograd.grad(expected.reshape(-1), wide, seed)
    assert mine.dtype is dtype
    unit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-24
    largest = other.abs().max().item()
    assert ((mine.double() - other).abs() <= unit * other.abs() + bound * largest).all()
    assert mine[1, 2:5].abs().max().item() == 0


def test_large_logits_do_not_overflow():
    logits, target = given(torch.float32, 1e4)
    found = chunked_cross_entropy(logits, target, -7)
    assert math.isfinite(found.item())
    assert torch.isfinite(torch.autograd.grad(found, logits)[0]).all()


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


def test_no_more_than_a_block_is_fp32():
    """Catches: logits, or a softmax, of all rows in fp32."""
    logits, target = given(torch.bfloat16)
    with Wide() as seen:
        chunked_cross_entropy(logits, target, -7, block_rows=2).backward()
    assert seen.largest == 2 * WORDS
    with Wide() as seen:
        functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-7).backward()
    assert seen.largest == ROWS * WORDS


def test_what_does_not_fit_is_refused():
    logits, target = given(torch.float32)
    with pytest.raises(ValueError, match="backend 'liger' is not built"):
        chunked_cross_entropy(logits, target, backend="liger")
    with pytest.raises(ValueError, match="got 'max'"):
        chunked_cross_entropy(logits, target, reduction="max")
    with pytest.raises(ValueError, match="block_rows"):
        chunked_cross_entropy(logits, target, block_rows=0)
    with pytest.raises(TensorError, match="target is"):
        chunked_cross_entropy(logits, target[:, 1:])
    with pytest.raises(TensorError, match=r"classes outside of 0 to 36"):
        chunked_cross_entropy(logits, target)
    with pytest.raises(TensorError, match="expected floating point"):
        chunked_cross_entropy(logits.long(), target, -7)
