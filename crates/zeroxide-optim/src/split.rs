//! The `split` state format: an fp32 master weight as a live bf16 weight and a 16-bit residual.
//!
//! The pair is `bits(master) = (high << 16) + sign_extend(low)`, modulo 2^32. The high half is the master
//! rounded half-up to bf16, the very weight that forward and backward use; the low half is what that
//! rounding took away. Nothing is lost: [`join`] gives every master back but for the payload of a NaN.

use crate::convert::{BF16_NAN, bf16_half_up};
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

/// The master weight that [`split`] took apart.
#[inline(always)]
pub fn join(high: u16, low: u16) -> f32 {
    let residual = i32::from(low.cast_signed()).cast_unsigned();
    f32::from_bits((u32::from(high) << 16).wrapping_add(residual))
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
