"""Every kernel on a GPU has the bits of its reference on the CPU, whatever the size, the address and the values."""

from __future__ import annotations

import pytest
import torch
from guarded import problem

import zeroxide.kernels
from zeroxide.kernels import arguments

CASES = {case.name: case for case in zeroxide.kernels.ALL}
SIZES = (0, 1, 31, 32, 33, 257, 4099, 1_000_003)
SPECIAL = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-45, -1e-40, 6e-8, -5.96e-8, 3e38, -65519.0, 1e-38]


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]


def test_sizes(case, launcher, device):
    """Catches: a lane beyond the end, rounding that differs from the CPU's, a fused multiply-add that nobody wrote."""
    wrong = {n: problem(case, n, launcher, device) for n in SIZES}
    assert {n: each for n, each in wrong.items() if each} == {}


def test_unaligned_views(case, launcher, device):
    """Catches: wide loads where the address does not allow them, which end the context."""
    wrong = {shift: problem(case, 1025, launcher, device, shift) for shift in (1, 3, 4)}
    assert {shift: each for shift, each in wrong.items() if each} == {}


def test_more_than_the_grid(case, launcher, device, monkeypatch):
    """Catches: lanes that stop after their first item."""
    for blocks in (1, 2):
        monkeypatch.setattr(arguments, "LARGEST_GRID", blocks)
        assert problem(case, 40_003, launcher, device) is None


@pytest.mark.parametrize("special", ["all", "finite"])
def test_special_values(case, launcher, device, special):
    """Catches: instructions that flush denormals or make another NaN, infinity or rounding of them than the CPU."""
    values = torch.tensor(SPECIAL if special == "all" else SPECIAL[3:])

    def change(inputs):
        for tensors in inputs.values():
            for tensor in tensors:
                if tensor.is_floating_point():
                    flat = tensor.view(-1)
                    at = torch.arange(0, flat.numel(), 37)
                    flat[at] = values[at // 37 % len(values)].to(flat.dtype)

    assert problem(case, 2000, launcher, device, change=change) is None


def test_a_kernel_takes_one_struct_of_the_wrapper_s_size(launcher):
    """Catches: a driver that tells no sizes, where a wrong struct would be read beyond its end."""
    for kernel in zeroxide.kernels.KERNELS:
        registers, _, argument_bytes = launcher.load(kernel).usage()
        assert registers > 0, kernel
        assert argument_bytes is not None, kernel
        assert argument_bytes > 0, kernel
