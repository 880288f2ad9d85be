//! Whole values in and out of stored state, as fp32, whatever the format keeps.

use bytemuck::cast_slice;
use zeroxide_layout::{Dtype, StateLayout};

use super::carried::Carried;
use super::{Codec, with_codec};
use crate::convert::{bf16_to_f32, f16_to_f32};
use crate::slot::Slot;

/// Stores `values` as live weights: fp32 as they are, bf16 rounded half up, fp16 to nearest even.
///
/// # Panics
/// If `live` has not the bytes of as many elements.
pub fn encode_live(layout: &StateLayout, values: &[f32], live: &mut [u8]) {
    fn run<C: Codec>(values: &[f32], live: &mut [u8]) {
        let live: &mut [C::Live] = bytemuck::cast_slice_mut(live);
        assert_eq!(
            values.len(),
            live.len(),
            "values and weights differ in length"
        );
        for (live, value) in live.iter_mut().zip(values) {
            *live = C::given(*value);
        }
    }
    with_codec!(layout, C => run::<C>(values, live));
}

/// Stores what `values` have beyond their live weights in the tensor that makes those exact.
///
/// # Panics
/// If `exact` has not the bytes of as many elements.
pub fn encode_exact(layout: &StateLayout, values: &[f32], exact: &mut [u8]) {
    fn run<C: Codec>(values: &[f32], exact: &mut [u8]) {
        let exact = C::Exact::elements_mut(exact, values.len());
        for (exact, value) in exact.iter_mut().zip(values) {
            *exact = C::encode(*value).1;
        }
    }
    with_codec!(layout, C => run::<C>(values, exact));
}

/// Reads the tensor that makes weights exact. Where [`exact_suffices`](super::exact_suffices) and no live weight was
/// changed, `out` holds the weights; everywhere it holds them after [`join_live`].
///
/// # Panics
/// If `out` has not as many elements.
pub fn carry_exact(layout: &StateLayout, exact: &[u8], out: &mut [f32]) {
    fn run<C: Codec>(exact: &[u8], out: &mut [f32]) {
        let exact = C::Exact::elements(exact, out.len());
        for (value, exact) in out.iter_mut().zip(exact) {
            *value = exact.carry();
        }
    }
    with_codec!(layout, C => run::<C>(exact, out));
}

/// Joins live weights to what [`carry_exact`] left in `values`, as an update does.
///
/// # Panics
/// If `values` has not as many elements.
pub fn join_live(layout: &StateLayout, live: &[u8], values: &mut [f32]) {
    fn run<C: Codec>(live: &[u8], values: &mut [f32]) {
        let live: &[C::Live] = cast_slice(live);
        assert_eq!(
            values.len(),
            live.len(),
            "values and weights differ in length"
        );
        for (value, live) in values.iter_mut().zip(live) {
            *value = C::decode(*live, C::Exact::carried(*value));
        }
    }
    with_codec!(layout, C => run::<C>(live, values));
}

/// Reads floats of `dtype`, exactly.
///
/// # Panics
/// If `out` has not as many elements.
pub fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        bytes.len(),
        out.len() * dtype.size(),
        "values differ in length"
    );
    let with = |out: &mut [f32], convert: fn(u16) -> f32| {
        for (value, source) in out.iter_mut().zip(cast_slice::<u8, u16>(bytes)) {
            *value = convert(*source);
        }
    };
    match dtype {
        Dtype::F32 => out.copy_from_slice(cast_slice(bytes)),
        Dtype::Bf16 => with(out, bf16_to_f32),
        Dtype::F16 => with(out, f16_to_f32),
    }
}
