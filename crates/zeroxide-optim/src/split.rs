//! The `split` state format: an fp32 master weight as a live bf16 weight and a 16-bit residual.
//!
//! The pair is `bits(master) = (high << 16) + sign_extend(low)`, modulo 2^32. The high half is the master
//! rounded half-up to bf16, the very weight that forward and backward use; the low half is what that
//! rounding took away. Nothing is lost: [`join`] gives every master back but for the payload of a NaN.
//!
//! The high half may be changed by others between two updates, so [`join`] must make sense of every pair: the
//! master it gives rounds to the high half, whatever the low half is. Where the sum would be a NaN (below
//! either zero, above either infinity), which no pair from [`split`] comes to, the low half is left out.

use crate::convert::{BF16_NAN, bf16_half_up, f16_nearest_even, f16_to_f32};
use crate::isa::{isa, per_isa};

/// Splits a master weight into its bf16 half and its residual. NaN becomes `(0x7fc0, 0)`.
#[inline(always)]
pub fn split(master: f32) -> (u16, u16) {
    let low = (master.to_bits() & 0xffff) as u16;
    if master.is_nan() {
        (BF16_NAN, 0)
    } else {
        (bf16_half_up(master), low)
    }
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

/// [`split`] over slices.
///
/// # Panics
/// If the slices differ in length.
pub fn split_slice(master: &[f32], high: &mut [u16], low: &mut [u16]) {
    split_kernel(isa(), master, high, low);
}

/// [`join`] over slices.
///
/// # Panics
/// If the slices differ in length.
pub fn join_slice(high: &[u16], low: &[u16], master: &mut [f32]) {
    join_kernel(isa(), high, low, master);
}

per_isa! {
    fn split_kernel[][](master: &[f32], high: &mut [u16], low: &mut [u16]) = split_loop(master, high, low);
}
per_isa! {
    fn join_kernel[][](high: &[u16], low: &[u16], master: &mut [f32]) = join_loop(high, low, master);
}

#[inline(always)]
fn split_loop(master: &[f32], high: &mut [u16], low: &mut [u16]) {
    assert_eq!(master.len(), high.len(), "master and high differ in length");
    assert_eq!(master.len(), low.len(), "master and low differ in length");
    for ((master, high), low) in master.iter().zip(high).zip(low) {
        (*high, *low) = split(*master);
    }
}

#[inline(always)]
fn join_loop(high: &[u16], low: &[u16], master: &mut [f32]) {
    assert_eq!(master.len(), high.len(), "master and high differ in length");
    assert_eq!(master.len(), low.len(), "master and low differ in length");
    for ((high, low), master) in high.iter().zip(low).zip(master) {
        *master = join(*high, *low);
    }
}
