"""Block-wise integers: how far values move, that random rounding has the right mean, and what is refused."""

from __future__ import annotations

import pytest
import torch
from emulated import RANDOM, Emulator, same_bits

from zeroxide.errors import TensorError
from zeroxide.kernels.philox import philox, random_words
from zeroxide.kernels.quantise import BLOCK, Quantised, dequantise, quantise, reference

PI = ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0))
ONES = ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (*ONES, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (*PI, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_random_numbers_are_those_of_the_paper(counter, key, expected):
    """The known answers that its authors publish. The kernel agrees with this function in every case."""
    got = philox([torch.tensor([each]) for each in counter], key)
    assert [word.item() for word in got] == expected


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", [None, 3])
def test_scales_of_every_magnitude_and_quotients_near_ties(libraries, bits, seed):
    """Catches: a quotient that is not correctly rounded, the short division where remainders are not exact, and codes
    that are not bounded."""
    generator = torch.Generator().manual_seed(4)
    steps = torch.randint(-14, 15, (BLOCK,), generator=generator) / 2
    blocks = []
    for exponent in (-149, -140, -128, -101, -62, -61, -60, -59, -20, 0, 17, 19, 20, 21, 100, 120):
        for factor in (1.0, 1.0 + 2.0**-23, 1.9999998, 1.3):
            scale = torch.tensor(factor * 2.0**exponent, dtype=torch.float64)
            block = (steps * scale).float()
            block[7] = (scale * (127 if bits == 8 else 7)).float()
            blocks.append(torch.nextafter(block, block.sign() * (exponent % 3 - 1) * 1e30))
    values = torch.cat(blocks)
    got = quantise(Emulator(libraries), values, bits, seed=seed, offset=5)
    expected = reference(values, bits, seed=seed, offset=5)
    assert torch.equal(got.codes, expected.codes)
    assert same_bits(got.scales, expected.scales)


def test_a_tiny_quotient_where_a_random_number_is_zero(libraries):
    """The first number of this place is below 2^-24: the floor is that of the quotient, minus 2^-150, which rounds to
    zero. Catches: the short division, which gives -2^-149 here, whose floor is -1."""
    values = torch.zeros(BLOCK)
    values[0], values[1] = -3 * 2.0**-149, 127 * 6.0
    seed, place = 3, 4595281
    assert random_words(1, seed, place, values.device).item() < 256
    got = quantise(Emulator(libraries), values, 8, seed=seed, offset=place)
    assert got.scales.item() == 6.0
    assert got.codes[0].item() == reference(values, 8, seed=seed, offset=place).codes[0].item() == 0


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_values_move_by_half_a_step_at_most(libraries, bits, levels):
    """Half a step, and what the roundings of quotient and value come to: 2^-22 of the largest value.

    The scale is at most one part in 2^7 larger than the largest value over the levels: bf16 rounded up."""
    values = torch.randn(5 * BLOCK + 17, generator=torch.Generator().manual_seed(2))
    made = quantise(Emulator(libraries), values, bits)
    back = dequantise(Emulator(libraries), made, torch.float32)
    steps = made.scales.float().repeat_interleave(BLOCK)[: values.numel()]
    assert ((back - values).abs() <= steps * (0.5 + levels * 2.0**-22)).all()
    largest = values[: 5 * BLOCK].view(5, BLOCK).abs().amax(1)
    ratio = made.scales[:5].double() * levels / largest
    assert (ratio >= 1 - 2.0**-23).all()
    assert (ratio <= 1 + 2.0**-7).all()


def test_random_rounding_has_the_right_mean(libraries):
    """40,000 draws of a value 0.3 steps above a code: their mean is off by five standard errors once in two million."""
    values = torch.full((40_000,), 10.3)
    values[::BLOCK] = 127.0
    drawn = quantise(Emulator(libraries), values, 8, seed=1).codes.float()[values != 127.0]
    assert set(drawn.tolist()) == {10.0, 11.0}
    assert abs(drawn.mean().item() - 10.3) < 5 * (0.3 * 0.7 / drawn.numel()) ** 0.5
    same = quantise(Emulator(libraries, RANDOM, seed=9), values, 8, seed=1).codes.float()[values != 127.0]
    assert torch.equal(same, drawn)
    for seed, offset in ((2, 0), (1, 1)):
        other = quantise(Emulator(libraries), values, 8, seed=seed, offset=offset).codes.float()[values != 127.0]
        assert not torch.equal(other, drawn)


def test_parts_with_their_offsets_are_the_whole(libraries):
    """Whoever quantises a part from the place of its first element on gets the bits of the whole."""
    values = torch.randn(8 * BLOCK)
    whole = quantise(Emulator(libraries), values, 8, seed=3, offset=100)
    part = quantise(Emulator(libraries), values[2 * BLOCK :], 8, seed=3, offset=100 + 2 * BLOCK // 4)
    assert torch.equal(whole.codes[2 * BLOCK :], part.codes)


def test_the_largest_numbers_and_what_is_none(libraries):
    largest = torch.finfo(torch.float32).max
    for value in (largest, -largest, 1e-45, 0.0):
        values = torch.full((BLOCK,), value)
        made = quantise(Emulator(libraries), values, 8)
        back = dequantise(Emulator(libraries), made, torch.float32)
        # Of denormals, a scale is at least the smallest bf16.
        assert (back - values).abs().max() <= max(abs(value) * 2.0**-7, 2.0**-133)
        assert back.isfinite().all()
    values = torch.ones(2 * BLOCK)
    values[3] = float("inf")
    back = dequantise(Emulator(libraries), quantise(Emulator(libraries), values, 4), torch.bfloat16)
    assert back[:BLOCK].isnan().all()
    # 147/1024 is the bf16 above 1/7, and 7 times that, 1.0049, is nearest to 1 + 2^-7.
    assert same_bits(back[BLOCK:], torch.full((BLOCK,), 1 + 2.0**-7, dtype=torch.bfloat16))


def test_values_go_where_they_are_to_be(libraries):
    """Catches: values in memory of their own, and such memory that does not fit."""
    made = quantise(Emulator(libraries), torch.linspace(-3, 3, 2 * BLOCK), 8)
    room = torch.zeros(4 * BLOCK)
    given = dequantise(Emulator(libraries), made, torch.float32, out=room[BLOCK : 3 * BLOCK])
    assert torch.equal(room[BLOCK : 3 * BLOCK], dequantise(Emulator(libraries), made, torch.float32))
    assert given.data_ptr() == room[BLOCK:].data_ptr()
    assert not room[:BLOCK].any()
    assert not room[3 * BLOCK :].any()
    with pytest.raises(TensorError, match="dequantise: out is of 1024 elements: expected a tensor of 512 elements"):
        dequantise(Emulator(libraries), made, torch.float32, out=room)
    with pytest.raises(TensorError, match="dequantise: out is float32: expected bfloat16"):
        dequantise(Emulator(libraries), made, torch.bfloat16, out=room[: 2 * BLOCK])


def test_refusals():
    with pytest.raises(ValueError, match="quantise: 3 bits: expected 8 or 4"):
        quantise(None, torch.ones(4), 3)
    with pytest.raises(TensorError, match="quantise: values is int64: expected float32 or bfloat16 or float16"):
        quantise(None, torch.arange(4), 8)
    codes = Quantised(8, torch.ones(4, dtype=torch.int8), torch.ones(1, dtype=torch.bfloat16), 5)
    with pytest.raises(TensorError, match="dequantise: codes is of 4 elements: expected a tensor of 5 elements"):
        dequantise(None, codes, torch.float32)
    with pytest.raises(TensorError, match="dequantise: dtype is int8: expected"):
        dequantise(None, codes, torch.int8)
