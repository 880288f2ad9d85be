//! Conversions against the `half` crate and by exhaustion.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut on purpose"
)]

mod random;

use half::{bf16, f16};
use proptest::prelude::*;
use random::Random;
use zeroxide_optim::{
    bf16_half_up, bf16_nearest_even, bf16_to_f32, f16_nearest_even, f16_to_f32, join, join_slice,
    split, split_slice,
};

#[test]
fn every_16_bit_value_is_read_exactly() {
    for bits in 0..=u16::MAX {
        assert_eq!(bf16_to_f32(bits).to_bits(), u32::from(bits) << 16);
        let (got, expected) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
        assert!(
            got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(),
            "{bits:#x}"
        );
    }
}

#[test]
fn every_16_bit_value_survives_the_round_trip() {
    for bits in 0..=u16::MAX {
        if !bf16::from_bits(bits).is_nan() {
            assert_eq!(bf16_nearest_even(bf16_to_f32(bits)), bits);
            assert_eq!(bf16_half_up(bf16_to_f32(bits)), bits);
        }
        if !f16::from_bits(bits).is_nan() {
            assert_eq!(f16_nearest_even(f16_to_f32(bits)), bits);
        }
    }
}

/// Every upper half with lower halves around the ties, and random ones.
fn patterns() -> impl Iterator<Item = f32> {
    let mut random = Random::new(1);
    (0..=u16::MAX).flat_map(move |high| {
        let random = random.bits() as u32 & 0xffff;
        [
            0, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8000, 0x8001, 0xffff,
            random,
        ]
        .map(|low| f32::from_bits((u32::from(high) << 16) | low))
    })
}

#[test]
fn rounding_to_nearest_even_is_that_of_half() {
    for value in patterns() {
        let (bf, f) = (bf16_nearest_even(value), f16_nearest_even(value));
        if value.is_nan() {
            assert_eq!((bf, f), (0x7fc0, 0x7e00));
        } else {
            assert_eq!(
                bf,
                bf16::from_f32(value).to_bits(),
                "{:#x}",
                value.to_bits()
            );
            assert_eq!(f, f16::from_f32(value).to_bits(), "{:#x}", value.to_bits());
        }
    }
}

#[test]
fn half_up_differs_from_nearest_even_on_ties_only() {
    for value in patterns().filter(|value| !value.is_nan()) {
        let tie = value.to_bits() & 0xffff == 0x8000;
        let (up, even) = (bf16_half_up(value), bf16_nearest_even(value));
        if tie {
            assert_eq!(u32::from(up), (value.to_bits() >> 16) + 1);
        } else {
            assert_eq!(up, even);
        }
    }
}

#[test]
fn split_is_invertible() {
    let values: Vec<f32> = patterns().collect();
    let (mut high, mut low, mut back) = (
        vec![0; values.len()],
        vec![0; values.len()],
        vec![0.0; values.len()],
    );
    split_slice(&values, &mut high, &mut low);
    join_slice(&high, &low, &mut back);
    for (index, value) in values.iter().enumerate() {
        assert_eq!(split(*value), (high[index], low[index]));
        assert_eq!(
            join(high[index], low[index]).to_bits(),
            back[index].to_bits()
        );
        if value.is_nan() {
            assert_eq!((high[index], low[index]), (0x7fc0, 0));
        } else {
            assert_eq!(back[index].to_bits(), value.to_bits());
            assert_eq!(high[index], bf16_half_up(*value));
        }
    }
}

proptest! {
    #[test]
    fn split_and_join_are_inverse(bits: u32) {
        let value = f32::from_bits(bits);
        let (high, low) = split(value);
        let expected = if value.is_nan() { 0x7fc0_0000 } else { bits };
        prop_assert_eq!(join(high, low).to_bits(), expected);
    }
}
