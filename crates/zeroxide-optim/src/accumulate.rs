//! Gradient accumulation: a gradient arrives in its home buffer, stored or added to what is there, and its
//! squared norm and the non-finite check are taken from the same pass over memory.

use crate::convert::{Bf16, Element, F16, F32};
use crate::grad::Grad;
use crate::isa::{Isa, isa, per_isa};

/// Elements whose squares are summed together before the running sum is touched.
const CHUNK: usize = 4096;
/// Partial sums within a chunk; element `i` of a chunk goes to partial sum `i % LANES`.
const LANES: usize = 16;

/// Home of a gradient, one element per parameter.
#[derive(Debug)]
pub enum GradMut<'a> {
    /// fp32.
    F32(&'a mut [f32]),
    /// bf16 bits.
    Bf16(&'a mut [u16]),
    /// fp16 bits.
    F16(&'a mut [u16]),
}

/// What accumulation does with the values already at home.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accumulate {
    /// Overwrites them: the first micro-batch of a step.
    Store,
    /// Adds to them in fp32, the sum then rounded to the home dtype, ties to even, as torch does.
    Add,
}

/// What an accumulation measured, over the values as they now lie at home.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct AccumulateStats {
    /// Sum of squares, in double precision and in a fixed order; zero unless the norm was asked for.
    pub sum_squares: f64,
    /// Whether a value is infinite or NaN; `false` unless the norm was asked for.
    pub nonfinite: bool,
}

/// Accumulates `src` in `dst`, on the widest instruction set at hand.
///
/// With `norm`, also sums the squares of the values stored and tells whether one is not finite. The order
/// of that sum is fixed: chunks of 4096 elements from the start of the slice, in each 16 interleaved
/// double-precision partial sums, folded pairwise; chunk sums are added in order. Squares cannot overflow
/// or lose bits, since the square of an fp32 value is exact in double precision.
///
/// # Panics
/// If `dst` and `src` differ in length.
pub fn accumulate(
    dst: GradMut<'_>,
    src: Grad<'_>,
    mode: Accumulate,
    norm: bool,
) -> AccumulateStats {
    accumulate_with(isa(), dst, src, mode, norm)
}

/// [`accumulate`] on a given instruction set, with the same bits.
///
/// # Panics
/// If `dst` and `src` differ in length, or the processor has no such instructions.
pub fn accumulate_with(
    isa: Isa,
    dst: GradMut<'_>,
    src: Grad<'_>,
    mode: Accumulate,
    norm: bool,
) -> AccumulateStats {
    macro_rules! run {
        ($dst:ident: $to:ty, $src:ident: $from:ty) => {
            match (mode, norm) {
                (Accumulate::Store, false) => {
                    accumulate_kernel::<$to, $from, false, false>(isa, $dst, $src)
                }
                (Accumulate::Store, true) => {
                    accumulate_kernel::<$to, $from, false, true>(isa, $dst, $src)
                }
                (Accumulate::Add, false) => {
                    accumulate_kernel::<$to, $from, true, false>(isa, $dst, $src)
                }
                (Accumulate::Add, true) => {
                    accumulate_kernel::<$to, $from, true, true>(isa, $dst, $src)
                }
            }
        };
    }
    let sum_squares = match (dst, src) {
        (GradMut::F32(dst), Grad::F32(src)) => run!(dst: F32, src: F32),
        (GradMut::F32(dst), Grad::Bf16(src)) => run!(dst: F32, src: Bf16),
        (GradMut::F32(dst), Grad::F16(src)) => run!(dst: F32, src: F16),
        (GradMut::Bf16(dst), Grad::F32(src)) => run!(dst: Bf16, src: F32),
        (GradMut::Bf16(dst), Grad::Bf16(src)) => run!(dst: Bf16, src: Bf16),
        (GradMut::Bf16(dst), Grad::F16(src)) => run!(dst: Bf16, src: F16),
        (GradMut::F16(dst), Grad::F32(src)) => run!(dst: F16, src: F32),
        (GradMut::F16(dst), Grad::Bf16(src)) => run!(dst: F16, src: Bf16),
        (GradMut::F16(dst), Grad::F16(src)) => run!(dst: F16, src: F16),
    };
    // Finite squares sum to at most 2^256 per element: only a value that is not finite gets the sum there.
    AccumulateStats {
        sum_squares,
        nonfinite: !sum_squares.is_finite(),
    }
}

/// What [`accumulate`] with `norm` tells of values that lie at home, which it leaves as they are: the same bits as if
/// they had been stored there by it.
pub fn measure(values: Grad<'_>) -> AccumulateStats {
    measure_with(isa(), values)
}

/// [`measure`] on a given instruction set, with the same bits.
///
/// # Panics
/// If the processor has no such instructions.
pub fn measure_with(isa: Isa, values: Grad<'_>) -> AccumulateStats {
    let sum_squares = match values {
        Grad::F32(values) => measure_kernel::<F32>(isa, values),
        Grad::Bf16(values) => measure_kernel::<Bf16>(isa, values),
        Grad::F16(values) => measure_kernel::<F16>(isa, values),
    };
    AccumulateStats {
        sum_squares,
        nonfinite: !sum_squares.is_finite(),
    }
}

per_isa! {
    fn measure_kernel[T: Element][T](values: &[T::Bits]) -> f64 = measure_loop::<T>(values);
}

#[inline(always)]
fn measure_loop<T: Element>(values: &[T::Bits]) -> f64 {
    let mut sum = 0.0;
    for chunk in values.chunks(CHUNK) {
        let mut lanes = [0.0_f64; LANES];
        let (rows, rest) = chunk.as_chunks::<LANES>();
        for row in rows {
            for (value, lane) in row.iter().zip(&mut lanes) {
                add_square::<T>(lane, *value);
            }
        }
        for (value, lane) in rest.iter().zip(&mut lanes) {
            add_square::<T>(lane, *value);
        }
        sum += fold(lanes);
    }
    sum
}

per_isa! {
    fn accumulate_kernel[To: Element, From: Element, const ADD: bool, const NORM: bool][To, From, ADD, NORM](
        dst: &mut [To::Bits], src: &[From::Bits],
    ) -> f64 = accumulate_loop::<To, From, ADD, NORM>(dst, src);
}

#[inline(always)]
fn accumulate_loop<To: Element, From: Element, const ADD: bool, const NORM: bool>(
    dst: &mut [To::Bits],
    src: &[From::Bits],
) -> f64 {
    assert_eq!(
        dst.len(),
        src.len(),
        "gradient home and source differ in length"
    );
    if !NORM {
        // A loop of its own: within the one below nothing but the sums would be vectorised.
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = merged::<To, From, ADD>(*dst, *src);
        }
        return 0.0;
    }
    let mut sum = 0.0;
    for (dst, src) in dst.chunks_mut(CHUNK).zip(src.chunks(CHUNK)) {
        let mut lanes = [0.0_f64; LANES];
        let mut dst_rows = dst.chunks_exact_mut(LANES);
        let mut src_rows = src.chunks_exact(LANES);
        for (dst, src) in dst_rows.by_ref().zip(src_rows.by_ref()) {
            for ((dst, src), lane) in dst.iter_mut().zip(src).zip(&mut lanes) {
                *dst = merged::<To, From, ADD>(*dst, *src);
                add_square::<To>(lane, *dst);
            }
        }
        let rest = dst_rows
            .into_remainder()
            .iter_mut()
            .zip(src_rows.remainder());
        for ((dst, src), lane) in rest.zip(&mut lanes) {
            *dst = merged::<To, From, ADD>(*dst, *src);
            add_square::<To>(lane, *dst);
        }
        sum += fold(lanes);
    }
    sum
}

/// What lies at home afterwards.
#[inline(always)]
fn merged<To: Element, From: Element, const ADD: bool>(
    home: To::Bits,
    gradient: From::Bits,
) -> To::Bits {
    let value = From::load(gradient);
    To::store(if ADD { To::load(home) + value } else { value })
}

#[inline(always)]
fn add_square<To: Element>(lane: &mut f64, value: To::Bits) {
    let value = f64::from(To::load(value));
    *lane += value * value;
}

/// Adds the upper half to the lower half until one value is left.
#[inline(always)]
fn fold(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}
