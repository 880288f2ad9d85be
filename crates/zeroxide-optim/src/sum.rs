//! Sums of gradients over ranks, in fp32 and in the order of the ranks.

use crate::convert::{Bf16, Element, F16, F32};
use crate::grad::Grad;
use crate::isa::{Isa, isa, per_isa};

/// `dst[i] = (sources[0][i] + sources[1][i] + ...) * scale` in fp32, added from left to right.
///
/// With no sources the sum is zero. The result does not depend on how the elements are cut into calls.
///
/// # Panics
/// If a source and `dst` differ in length, or two sources in dtype.
pub fn sum_scaled(dst: &mut [f32], sources: &[Grad<'_>], scale: f32) {
    sum_scaled_with(isa(), dst, sources, scale);
}

/// [`sum_scaled`] on a given instruction set, with the same bits.
///
/// # Panics
/// As there, or if the processor has no such instructions.
pub fn sum_scaled_with(isa: Isa, dst: &mut [f32], sources: &[Grad<'_>], scale: f32) {
    macro_rules! sum {
        ($kind:ident, $from:ty) => {{
            let elements = sources.iter().map(|source| match source {
                Grad::$kind(source) => *source,
                _ => panic!("sources differ in dtype"),
            });
            sum_of::<$from>(isa, dst, elements, scale);
        }};
    }
    match sources.first() {
        None => dst.fill(0.0),
        Some(Grad::F32(_)) => sum!(F32, F32),
        Some(Grad::Bf16(_)) => sum!(Bf16, Bf16),
        Some(Grad::F16(_)) => sum!(F16, F16),
    }
}

/// The sum of at least one source. Each pass over `dst` does as much as it can: the first takes two sources, the last
/// scales.
fn sum_of<'a, From: Element<Bits: 'a>>(
    isa: Isa,
    dst: &mut [f32],
    mut sources: impl ExactSizeIterator<Item = &'a [From::Bits]>,
    scale: f32,
) {
    let first = sources.next().expect("there is a source");
    let Some(second) = sources.next() else {
        return single_kernel::<From>(isa, dst, first, scale);
    };
    if sources.len() == 0 {
        return pair_kernel::<From, true>(isa, dst, first, second, scale);
    }
    pair_kernel::<From, false>(isa, dst, first, second, scale);
    while let Some(source) = sources.next() {
        if sources.len() == 0 {
            add_kernel::<From, true>(isa, dst, source, scale);
        } else {
            add_kernel::<From, false>(isa, dst, source, scale);
        }
    }
}

per_isa! {
    fn single_kernel[From: Element][From](
        dst: &mut [f32], src: &[From::Bits], scale: f32,
    ) = single_loop::<From>(dst, src, scale);
}

per_isa! {
    fn pair_kernel[From: Element, const LAST: bool][From, LAST](
        dst: &mut [f32], first: &[From::Bits], second: &[From::Bits], scale: f32,
    ) = pair_loop::<From, LAST>(dst, first, second, scale);
}

per_isa! {
    fn add_kernel[From: Element, const LAST: bool][From, LAST](
        dst: &mut [f32], src: &[From::Bits], scale: f32,
    ) = add_loop::<From, LAST>(dst, src, scale);
}

#[inline(always)]
fn single_loop<From: Element>(dst: &mut [f32], src: &[From::Bits], scale: f32) {
    assert_eq!(dst.len(), src.len(), "{LENGTHS}");
    for (dst, src) in dst.iter_mut().zip(src) {
        *dst = From::load(*src) * scale;
    }
}

#[inline(always)]
fn pair_loop<From: Element, const LAST: bool>(
    dst: &mut [f32],
    first: &[From::Bits],
    second: &[From::Bits],
    scale: f32,
) {
    assert_eq!(dst.len(), first.len(), "{LENGTHS}");
    assert_eq!(dst.len(), second.len(), "{LENGTHS}");
    for ((dst, first), second) in dst.iter_mut().zip(first).zip(second) {
        let sum = From::load(*first) + From::load(*second);
        *dst = if LAST { sum * scale } else { sum };
    }
}

#[inline(always)]
fn add_loop<From: Element, const LAST: bool>(dst: &mut [f32], src: &[From::Bits], scale: f32) {
    assert_eq!(dst.len(), src.len(), "{LENGTHS}");
    for (dst, src) in dst.iter_mut().zip(src) {
        let sum = *dst + From::load(*src);
        *dst = if LAST { sum * scale } else { sum };
    }
}

const LENGTHS: &str = "sum and source differ in length";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::{bf16_nearest_even, bf16_to_f32};

    /// Values whose sum in another order, or in bf16, has other bits.
    fn values(rank: u16) -> Vec<f32> {
        (0..1003_u16)
            .map(|index| {
                let sign = if (index + rank).is_multiple_of(3) {
                    -1.0
                } else {
                    1.0
                };
                sign * (1.0 + f32::from(index) / 7.0) * 10.0_f32.powi(4 - 4 * i32::from(rank))
            })
            .collect()
    }

    #[test]
    fn the_sum_is_taken_in_rank_order_in_fp32() {
        for count in 1..=5_u16 {
            let ranks: Vec<Vec<f32>> = (0..count).map(values).collect();
            let scale = 1.0 / f32::from(count);
            let expected: Vec<f32> = (0..1003)
                .map(|i| {
                    let others = ranks[1..].iter().map(|rank| rank[i]);
                    others.fold(ranks[0][i], |sum, value| sum + value) * scale
                })
                .collect();
            let sources: Vec<_> = ranks.iter().map(|rank| Grad::F32(rank)).collect();
            let mut sum = vec![f32::NAN; 1003];
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                sum_scaled_with(isa, &mut sum, &sources, scale);
                assert_eq!(sum, expected, "{count} ranks");
            }
        }
    }

    #[test]
    #[should_panic(expected = "sources differ in dtype")]
    fn sources_of_two_dtypes_are_refused() {
        sum_scaled(&mut [0.0], &[Grad::F32(&[1.0]), Grad::Bf16(&[0])], 1.0);
    }

    #[test]
    fn bf16_is_widened_before_it_is_added() {
        let ranks: Vec<Vec<u16>> = (0..2)
            .map(|rank| values(rank).into_iter().map(bf16_nearest_even).collect())
            .collect();
        let sources: Vec<_> = ranks.iter().map(|rank| Grad::Bf16(rank)).collect();
        let mut sum = vec![0.0; 1003];
        sum_scaled(&mut sum, &sources, 1.0);
        let expected: Vec<f32> = (0..1003)
            .map(|index| bf16_to_f32(ranks[0][index]) + bf16_to_f32(ranks[1][index]))
            .collect();
        assert_eq!(sum, expected);
        sum_scaled(&mut sum, &[], 1.0);
        assert_eq!(sum, vec![0.0; 1003]);
    }
}
