//! The weight of the `compact` state format: the upper 24 bits of an fp32 master, as a live bf16 weight and an 8-bit
//! residual.
//!
//! The pair is that of the `split` format with a residual whose lower byte is zero: `bits(master) = (high << 16) +
//! (sign_extend(low) << 8)`. One unit of the residual is 1/256 of the distance between neighbouring bf16 values. What a
//! master has beyond its 24 bits is rounded: an update rounds at random, so that steps far below a unit still add up,
//! and values that are given are rounded to the nearest.

use super::Codec;
use super::split::{join, split};

const EXPONENT: u32 = 0x7f80_0000;

/// The upper bits of `value` and, in the lower ones (`mask`), zeros: rounded up in magnitude where `noise`, below or
/// equal to `mask`, carries over. A finite value stays finite; infinities and the canonical NaN stay what they are.
#[inline(always)]
pub(crate) fn round_magnitude(value: f32, noise: u32, mask: u32) -> f32 {
    let bits = value.to_bits();
    let sum = bits.wrapping_add(noise);
    let rounded = if sum & EXPONENT == EXPONENT {
        bits
    } else {
        sum
    };
    f32::from_bits(rounded & !mask)
}

/// A bf16 weight and the third byte of its master.
pub(crate) struct Compact;

impl Compact {
    #[inline(always)]
    fn taken_apart(rounded: f32) -> (u16, u8) {
        let (high, low) = split(rounded);
        (high, low.to_be_bytes()[0])
    }
}

impl Codec for Compact {
    type Live = u16;
    type Exact = u8;
    const EXACT_SUFFICES: bool = false;

    #[inline(always)]
    fn decode(live: u16, low: u8) -> f32 {
        join(live, u16::from(low) << 8)
    }

    #[inline(always)]
    fn encode(weight: f32) -> (u16, u8) {
        Self::encode_drawn(weight, 0x80)
    }

    #[inline(always)]
    fn encode_drawn(weight: f32, word: u32) -> (u16, u8) {
        Self::taken_apart(round_magnitude(
            crate::convert::canonical(weight),
            word & 0xff,
            0xff,
        ))
    }
}
