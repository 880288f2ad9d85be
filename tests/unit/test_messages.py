"""Messages of block-wise integers: their codes and scales are those of `zeroxide.kernels.quantise`, and so of the CUDA
kernels, and what is no message is refused.

What they do to values is shown by `crates/zeroxide-optim/tests/blocks.rs`.
"""

from __future__ import annotations

import pytest
import torch

from zeroxide import _core
from zeroxide.device.placement import DTYPE_NAMES, spec
from zeroxide.kernels.quantise import BLOCK, Quantised, reference, reference_values

BLOCKS = 37


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Blocks of many sizes, down to denormals; one is zero, one has an infinity, one the largest number."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(BLOCKS, BLOCK, generator=generator)
    values *= 2.0 ** torch.linspace(-140, 120, BLOCKS)[:, None] if dtype is not torch.float16 else 1.0
    values[3] = 0.0
    values[5, 17] = float("inf")
    values[6, 255] = torch.finfo(dtype).max
    values[7, 0], values[7, 1:] = 7.0, torch.arange(255) / 2 - 60
    return values.to(dtype).flatten()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def message_of(quantised: Quantised) -> torch.Tensor:
    """Block after block, its scale before its codes."""
    scales = as_bytes(quantised.scales).view(BLOCKS, 2)
    return torch.cat([scales, as_bytes(quantised.codes).view(BLOCKS, -1)], dim=1).flatten()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_a_message_has_the_bits_of_the_kernels(bits, dtype):
    # Catches: a scale or code of another rounding, a NaN of other bits, halves of a byte in another order.
    values = numbers(dtype)
    name = DTYPE_NAMES[dtype]
    expected = reference(values, bits)
    message = torch.empty(_core.message_bytes(values.numel(), bits), dtype=torch.uint8)
    _core.quantise_message(spec(as_bytes(values)), name, bits, spec(message))
    assert torch.equal(message, message_of(expected))
    for to in DTYPE_NAMES:
        back = torch.empty(values.numel(), dtype=to)
        _core.dequantise_message(spec(message), bits, spec(as_bytes(back)), DTYPE_NAMES[to])
        wanted = reference_values(expected, to)
        assert torch.equal(back.isnan(), wanted.isnan())
        assert torch.equal(back.nan_to_num(0.0), wanted.nan_to_num(0.0))
        room = torch.zeros(values.numel() * to.itemsize, dtype=torch.uint8)
        room[-message.numel() :] = message
        _core.expand_message(spec(room), DTYPE_NAMES[to], bits)
        assert torch.equal(room, as_bytes(back))


def test_what_is_kept_is_what_torch_keeps():
    # Catches: another order of operations, by which ranks on a device would part from those on a host.
    given = numbers(torch.bfloat16).nan_to_num(0.0, 0.0).clamp(-1e30, 1e30)
    kept = (given.roll(5) / 9).to(torch.bfloat16)
    factor, beta = 0.5, 0.75
    room, residual = as_bytes(given.clone()), kept.clone()
    _core.shrink_gradients(spec(room), "bf16", spec(residual), factor=factor, beta=beta)
    before = kept.float() * factor
    moved = given.float() + before
    quantised = reference(moved, 4)
    message = message_of(quantised)
    assert torch.equal(room[: message.numel()], message)
    lost = moved - reference_values(quantised, torch.float32)
    assert torch.equal(residual, (beta * before + (1 - beta) * lost).to(torch.bfloat16))
    sums = torch.ones_like(moved)
    _core.add_message(spec(sums), spec(message))
    assert torch.equal(sums, 1 + reference_values(quantised, torch.float32))


def test_what_is_no_message_is_refused():
    room, message = torch.zeros(1024, dtype=torch.uint8), torch.zeros(258, dtype=torch.uint8)
    with pytest.raises(ValueError, match="300 elements: expected whole blocks of 256"):
        _core.message_bytes(300, 8)
    with pytest.raises(ValueError, match="3 bits: expected 8 or 4"):
        _core.message_bytes(256, 3)
    with pytest.raises(ValueError, match=r"1000 bytes .* expected whole blocks of 256 aligned bfloat16 elements"):
        _core.expand_message(spec(room[:1000]), "bf16", 8)
    with pytest.raises(ValueError, match="expected whole blocks of 256 aligned float32 elements"):
        _core.expand_message(spec(torch.zeros(1025, dtype=torch.uint8)[1:]), "f32", 8)
    with pytest.raises(ValueError, match="bytes of a message: expected 258, got 257"):
        _core.quantise_message(spec(room), "f32", 8, spec(message[:257]))
    with pytest.raises(ValueError, match="bytes of a message: expected 130, got 258"):
        _core.dequantise_message(spec(message), 4, spec(room), "f32")
    with pytest.raises(ValueError, match="elements kept: expected 256, got 100"):
        _core.shrink_gradients(spec(room), "f32", spec(torch.zeros(100, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match="200 sums: expected whole blocks"):
        _core.add_message(spec(torch.zeros(200)), spec(message))
    with pytest.raises(ValueError, match="bytes of a message: expected 130, got 258"):
        _core.add_message(spec(torch.zeros(256)), spec(message))
