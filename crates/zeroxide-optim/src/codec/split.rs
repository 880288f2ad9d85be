//! The `split` state format: an fp32 master weight as a live bf16 weight and a 16-bit residual.
//!
//! The pair is `bits(master) = (high << 16) + sign_extend(low)`, modulo 2^32. The high half is the master
//! rounded half-up to bf16, the very weight that forward and backward use; the low half is what that
//! rounding took away. Nothing is lost: [`join`] gives every master back but for the payload of a NaN.
//!
//! The high half may be changed by others between two updates, so [`join`] must make sense of every pair: the
//! master it gives rounds to the high half, whatever the low half is. Where the sum would be a NaN (below
//! either zero, above either infinity), which no pair from [`split`] comes to, the low half is left out.

use super::Codec;
use crate::convert::{canonical, f16_nearest_even, f16_to_f32, half_up_of_canonical};

/// Splits a master weight into its bf16 half and its residual. NaN becomes `(0x7fc0, 0)`.
#[inline(always)]
pub fn split(master: f32) -> (u16, u16) {
    // The canonical NaN has an upper half that rounds to itself and an empty lower one: one blend serves both halves.
    let master = canonical(master);
    (
        half_up_of_canonical(master),
        (master.to_bits() & 0xffff) as u16,
    )
}

/// The master weight that [`split`] took apart, or for any other pair one that rounds half up to `high`.
#[inline(always)]
pub fn join(high: u16, low: u16) -> f32 {
    let residual = i32::from(low.cast_signed()).cast_unsigned();
    let upper = u32::from(high) << 16;
    let joined = f32::from_bits(upper.wrapping_add(residual));
    if joined.is_nan() {
        f32::from_bits(upper)
    } else {
        joined
    }
}

/// The master weight of a live bf16 weight that stands beside it whole: `master` where `live` is its rounding, and
/// where `live` was changed, what [`join`] makes of it and the residual. So both formats take the same value, as long
/// as a master that is NaN is the canonical one, which has no residual.
#[inline(always)]
pub fn with_bf16(master: f32, live: u16) -> f32 {
    join(live, (master.to_bits() & 0xffff) as u16)
}

/// The same for a live fp16 weight: `master` where `live` is its rounding, else `live` itself.
#[inline(always)]
pub fn with_f16(master: f32, live: u16) -> f32 {
    if f16_nearest_even(master) == live {
        master
    } else {
        f16_to_f32(live)
    }
}

/// The halves of an fp32 weight, the upper one live.
pub(crate) struct Split;

impl Codec for Split {
    type Live = u16;
    type Exact = u16;
    const EXACT_SUFFICES: bool = false;

    #[inline(always)]
    fn decode(live: u16, low: u16) -> f32 {
        join(live, low)
    }

    #[inline(always)]
    fn encode(weight: f32) -> (u16, u16) {
        split(weight)
    }
}
