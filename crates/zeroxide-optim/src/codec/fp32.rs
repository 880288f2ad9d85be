//! The `fp32` format: the weight as an fp32 value, and where the compute dtype is lower a rounded copy beside it.

use super::Codec;
use super::split::{with_bf16, with_f16};
use crate::convert::{canonical, f16_nearest_even, half_up_of_canonical};

/// fp32 weights, exact by themselves.
pub(crate) struct Whole;

impl Codec for Whole {
    type Live = f32;
    type Exact = ();
    const EXACT_SUFFICES: bool = false;

    #[inline(always)]
    fn decode(live: f32, (): ()) -> f32 {
        live
    }

    #[inline(always)]
    fn encode(weight: f32) -> (f32, ()) {
        (canonical(weight), ())
    }

    #[inline(always)]
    fn given(value: f32) -> f32 {
        value
    }
}

/// An fp32 master weight beside a bf16 one.
pub(crate) struct MasterBf16;

impl Codec for MasterBf16 {
    type Live = u16;
    type Exact = f32;
    const EXACT_SUFFICES: bool = true;

    #[inline(always)]
    fn decode(live: u16, master: f32) -> f32 {
        with_bf16(master, live)
    }

    #[inline(always)]
    fn encode(weight: f32) -> (u16, f32) {
        let master = canonical(weight);
        (half_up_of_canonical(master), master)
    }
}

/// An fp32 master weight beside an fp16 one.
pub(crate) struct MasterF16;

impl Codec for MasterF16 {
    type Live = u16;
    type Exact = f32;
    const EXACT_SUFFICES: bool = true;

    #[inline(always)]
    fn decode(live: u16, master: f32) -> f32 {
        with_f16(master, live)
    }

    #[inline(always)]
    fn encode(weight: f32) -> (u16, f32) {
        (f16_nearest_even(weight), canonical(weight))
    }
}
