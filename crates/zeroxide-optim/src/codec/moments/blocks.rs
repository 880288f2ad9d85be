//! Blocks of 64 elements with a bf16 unit `u` and a code of 8 bits each.
//!
//! A code `c` stands for `c |c| u`: neighbouring codes are close where values are small (companding by the square root).
//! Values of either sign have codes from -127 to 127, others from 0 to 255; `u` is the largest magnitude over the square of
//! the largest code, rounded up to bf16. Each value that a block stands for is exact in fp32: the square has at most 16
//! bits and the unit 8.
//!
//! The largest value of a block therefore has its largest code or the one below. From the values alone, so, the unit can
//! be found again ([`Blocks::encode`]), and a block that was read comes back to its bits.
//!
//! A value of the unsigned kind that is not zero never becomes zero: a root of zero in a denominator would be a step
//! without a bound. So the smallest such values are rounded up to `u`. A block that holds an infinity, a NaN or, in the
//! unsigned kind, a negative value has the unit NaN, and only NaN comes back from it.

use zeroxide_layout::STATE_BLOCK;

use super::{Moments, Values};
use crate::convert::{BF16_NAN, bf16_to_f32};
use crate::draw::Words;

const INFINITY: u32 = 0x7f80_0000;
/// The smallest normal bf16: no unit but zero is below it, since subnormal units have fewer bits.
const LEAST_UNIT: u32 = 0x0080;
/// 1.5 * 2^23: adding it rounds a small number to an integer, which is then in the lowest bits of the sum.
const ALIGN: f32 = 12_582_912.0;
/// Rounding up where the noise is below the part of the way to the next code: halfway, for the nearest.
const HALFWAY: Values = [0.5; STATE_BLOCK];

/// An odd number without a pattern: 2^32 over the golden ratio.
const ODD: u32 = 0x9e37_79b1;

/// Bytes before the codes.
const UNIT_BYTES: usize = 2;

/// See the file's header.
pub(crate) struct Blocks;

impl Moments for Blocks {
    #[inline(always)]
    fn bytes(elements: usize) -> usize {
        elements.div_ceil(STATE_BLOCK) * zeroxide_layout::STATE_BLOCK_BYTES
    }

    #[inline(always)]
    fn load(bytes: &[u8], signed: bool) -> Values {
        let (unit, codes) = bytes.split_at(UNIT_BYTES);
        let unit = bf16_to_f32(u16::from_le_bytes([unit[0], unit[1]]));
        let codes: &[u8; STATE_BLOCK] = codes.try_into().expect("a block has as many codes");
        let mut values = [0.0; STATE_BLOCK];
        if signed {
            for (value, code) in values.iter_mut().zip(codes) {
                let code = f32::from(code.cast_signed());
                *value = code * code.abs() * unit;
            }
        } else {
            for (value, code) in values.iter_mut().zip(codes) {
                let code = f32::from(*code);
                *value = code * code * unit;
            }
        }
        values
    }

    #[inline(always)]
    fn store(values: &Values, signed: bool, words: &Words, second: bool, bytes: &mut [u8]) {
        // The lowest byte of a word is the weight's. The second tensor takes the bits of an odd multiple, which is any
        // word as often as another.
        let factor = if second { ODD } else { 1 };
        let mut noise = [0.0; STATE_BLOCK];
        for (noise, word) in noise.iter_mut().zip(words) {
            *noise = unit_interval(word.wrapping_mul(factor));
        }
        let largest = if signed { 127.0 } else { 255.0 };
        write(
            values,
            unit_of(values, signed, largest),
            signed,
            &noise,
            bytes,
        );
    }
}

impl Blocks {
    /// Stores values as they are given, each as the nearest that there is a code for. Where there is a unit of which all
    /// of them are codes, as of all that [`load`](Moments::load) gives, it is that one and nothing changes.
    pub(crate) fn encode(values: &Values, signed: bool, bytes: &mut [u8]) {
        let largest = if signed { 127.0 } else { 255.0 };
        let unit = unit_of(values, signed, largest);
        write(values, unit, signed, &HALFWAY, bytes);
        if same(values, &Self::load(bytes, signed)) {
            return;
        }
        // The largest value may have been rounded to the code below the largest one.
        let other = unit_of(values, signed, largest - 1.0);
        let mut found = [0; zeroxide_layout::STATE_BLOCK_BYTES];
        write(values, other, signed, &HALFWAY, &mut found);
        if same(values, &Self::load(&found, signed)) {
            bytes.copy_from_slice(&found);
        }
    }
}

/// An odd multiple of 2^-24 between 0 and 1, by the upper 23 bits of a word: exact, and the mean of all is a half.
#[inline(always)]
fn unit_interval(word: u32) -> f32 {
    // With the exponent of 1, less 1 and the half of what the lowest bit is worth.
    f32::from_bits(0x3f80_0000 | (word >> 9)) - (1.0 - 0.5 / 8_388_608.0)
}

/// Whether all of them are equal, zeros of either sign too, and none is NaN.
#[expect(clippy::float_cmp, reason = "what a block stands for is exact")]
fn same(values: &Values, others: &Values) -> bool {
    values
        .iter()
        .zip(others)
        .all(|(value, other)| value == other)
}

/// The unit of which the largest of `values` is the square of `largest`, rounded up; its bf16 bits.
#[inline(always)]
fn unit_of(values: &Values, signed: bool, largest: f32) -> u16 {
    let mut most = 0;
    for value in values {
        // As integers NaN lies above infinity, and what is negative above both; adding zero makes -0 a 0.
        let bits = (value + 0.0).to_bits();
        most = most.max(if signed { bits & 0x7fff_ffff } else { bits });
    }
    if most >= INFINITY {
        return BF16_NAN;
    }
    if most == 0 {
        return 0;
    }
    let quotient = f32::from_bits(most) / (largest * largest);
    let rounded = ((quotient.to_bits() + 0xffff) >> 16).max(LEAST_UNIT);
    // Next to the largest fp32 value the unit below: the largest code stands for a finite value.
    let finite = (f32::from_bits(rounded << 16) * (largest * largest)).is_finite();
    let [low, high, ..] = (rounded - u32::from(!finite)).to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// Writes the codes of `values` in units of `unit`: one up where `noise` is below the part of the way to the next code.
#[inline(always)]
fn write(values: &Values, unit: u16, signed: bool, noise: &Values, bytes: &mut [u8]) {
    let (head, codes) = bytes.split_at_mut(UNIT_BYTES);
    head.copy_from_slice(&unit.to_le_bytes());
    let places: &mut [u8; STATE_BLOCK] = codes.try_into().expect("a block has as many codes");
    if unit == BF16_NAN {
        *places = [0; STATE_BLOCK];
        return;
    }
    let unit = bf16_to_f32(unit);
    let inverse = if unit == 0.0 { 0.0 } else { 1.0 / unit };
    let (highest, smallest) = if signed { (126.0, 0.0) } else { (254.0, 1.0) };
    for ((place, value), chance) in places.iter_mut().zip(values).zip(noise) {
        let magnitude = value.abs();
        let root = (magnitude * inverse).sqrt();
        // The code below, or one less where the root is next to a whole number; then the other one is certain.
        let below = ((root - 0.5 + ALIGN) - ALIGN).min(highest);
        let beyond = magnitude - below * below * unit;
        let width = (below + below + 1.0) * unit;
        let up = if chance * width < beyond { 1.0 } else { 0.0 };
        let floor = if magnitude > 0.0 { smallest } else { 0.0 };
        let found = (below + up).max(floor);
        let found = if *value < 0.0 { -found } else { found };
        *place = (found + ALIGN).to_bits().to_le_bytes()[0];
    }
}
