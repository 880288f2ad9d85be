"""The norm of many gradients: with the bits of the core's, and what it refuses."""

from __future__ import annotations

import core_kernels
import pytest
import torch
from emulated import RANDOM, Emulator

from zeroxide.errors import TensorError
from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.norm import PIECE, scaled_norm


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_norm_has_the_bits_of_the_cores(libraries, dtype):
    """Sizes on both sides of chunks and pieces. Catches: sums in another order, or in less than double precision."""
    sizes = [1, 4095, 4096, PIECE - 1, 2 * PIECE + 4097, 15, 33]
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator).mul(10.0 ** (at % 3)).to(dtype) for at, size in enumerate(sizes)]
    expected, nonfinite = core_kernels.norm(tensors)
    got = scaled_norm(Emulator(libraries, RANDOM, seed=3), tensors, scale=0.5)
    assert (got.sum_squares.item(), bool(got.nonfinite)) == (expected, nonfinite) == (expected, False)
    assert got.norm.item() == 0.5 * expected**0.5
    # Another order gives another sum: the comparison above could have failed.
    assert torch.cat(tensors).double().square().flip(0).cumsum(0)[-1].item() != expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 5000, -1])
def test_what_is_not_finite_is_found(libraries, value, at):
    tensors = [torch.ones(9001), torch.ones(9001)]
    assert scaled_norm(Emulator(libraries), tensors).nonfinite.item() == 0
    tensors[1][at] = value
    assert scaled_norm(Emulator(libraries), tensors).nonfinite.item() == 1
    # The largest finite values are no infinity.
    largest = [torch.full((9001,), torch.finfo(torch.float32).max)]
    assert scaled_norm(Emulator(libraries), largest).nonfinite.item() == 0


def test_refusals():
    """One line that names the tensor; nothing is launched."""
    ones = torch.ones(4)

    def refused(tensors):
        with pytest.raises(TensorError) as caught:
            scaled_norm(None, tensors)
        return str(caught.value), caught.value.name, caught.value.expected, caught.value.got

    assert refused([])[1:] == ("tensors", "one", "none")
    assert refused([ones, ones.half()])[1:] == ("tensors[1]", "float32", "float16")
    assert refused([ones.int()])[1:] == ("tensors[0]", "float32 or bfloat16 or float16", "int32")
    assert refused([torch.ones(4, 4).T])[1:] == ("tensors[0]", "a contiguous tensor", "strided (1, 4) over (4, 4)")
    assert refused([ones, torch.ones(4, device="meta")])[1:] == ("tensors[1]", "a tensor on cpu", "on meta")
    assert refused([ones, ones, torch.ones(8)[::2]])[1:3] == ("tensors[2]", "a contiguous tensor")
    line = "scaled_norm: tensors[1] is on meta: expected a tensor on cpu"
    assert refused([ones, torch.ones(4, device="meta")])[0] == line


def test_the_order_of_a_chunks_sums(libraries):
    """Chunks by themselves, since a sum of many rounds away what their orders differ by. Catches: rows or partial sums
    that are added in another order."""
    generator = torch.Generator().manual_seed(2)
    for size in [4096] * 12 + [4095, 300, 77, 33]:
        chunk = torch.randn(size, generator=generator) * torch.randint(1, 30, (size,), generator=generator)
        expected, _ = core_kernels.norm([chunk])
        assert scaled_norm(Emulator(libraries), [chunk]).sum_squares.item() == expected
