//! Sums of gradients over ranks, in fp32 and in the order of the ranks.

use crate::convert::{Bf16, Element, F16, F32};
use crate::grad::Grad;
use crate::isa::{Isa, isa, per_isa};

/// `dst[i] = (sources[0][i] + sources[1][i] + ...) * scale` in fp32, added from left to right.
///
/// With no sources the sum is zero. The result does not depend on how the elements are cut into calls.
///
/// # Panics
/// If a source and `dst` differ in length.
pub fn sum_scaled(dst: &mut [f32], sources: &[Grad<'_>], scale: f32) {
    sum_scaled_with(isa(), dst, sources, scale);
}

/// [`sum_scaled`] on a given instruction set, with the same bits.
///
/// # Panics
/// As there, or if the processor has no such instructions.
pub fn sum_scaled_with(isa: Isa, dst: &mut [f32], sources: &[Grad<'_>], scale: f32) {
    if sources.is_empty() {
        dst.fill(0.0);
        return;
    }
    for (index, source) in sources.iter().enumerate() {
        let first = index == 0;
        match (source, first) {
            (Grad::F32(src), true) => add_kernel::<F32, true>(isa, dst, src),
            (Grad::F32(src), false) => add_kernel::<F32, false>(isa, dst, src),
            (Grad::Bf16(src), true) => add_kernel::<Bf16, true>(isa, dst, src),
            (Grad::Bf16(src), false) => add_kernel::<Bf16, false>(isa, dst, src),
            (Grad::F16(src), true) => add_kernel::<F16, true>(isa, dst, src),
            (Grad::F16(src), false) => add_kernel::<F16, false>(isa, dst, src),
        }
    }
    scale_kernel(isa, dst, scale);
}

per_isa! {
    fn add_kernel[From: Element, const FIRST: bool][From, FIRST](
        dst: &mut [f32], src: &[From::Bits],
    ) = add_loop::<From, FIRST>(dst, src);
}

per_isa! {
    fn scale_kernel[][](dst: &mut [f32], scale: f32) = scale_loop(dst, scale);
}

#[inline(always)]
fn add_loop<From: Element, const FIRST: bool>(dst: &mut [f32], src: &[From::Bits]) {
    assert_eq!(dst.len(), src.len(), "sum and source differ in length");
    for (dst, src) in dst.iter_mut().zip(src) {
        let value = From::load(*src);
        *dst = if FIRST { value } else { *dst + value };
    }
}

#[inline(always)]
fn scale_loop(dst: &mut [f32], scale: f32) {
    for value in dst {
        *value *= scale;
    }
}

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
        let ranks: Vec<Vec<f32>> = (0..3).map(values).collect();
        let expected: Vec<f32> = (0..1003)
            .map(|i| ((ranks[0][i] + ranks[1][i]) + ranks[2][i]) * (1.0 / 3.0))
            .collect();
        let sources: Vec<_> = ranks.iter().map(|rank| Grad::F32(rank)).collect();
        let mut sum = vec![f32::NAN; 1003];
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            sum_scaled_with(isa, &mut sum, &sources, 1.0 / 3.0);
            assert_eq!(sum, expected);
        }
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
