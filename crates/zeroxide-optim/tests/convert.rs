//! Conversions against the `half` crate and by exhaustion.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut on purpose"
)]

mod kernels;
mod random;

use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};
use kernels::layout;
use proptest::prelude::*;
use random::Random;
use zeroxide_layout::{Dtype, Format};
use zeroxide_optim::{
    bf16_half_up, bf16_nearest_even, bf16_to_f32, carry_exact, encode_exact, encode_live,
    f16_nearest_even, f16_to_f32, join, join_live, split, with_bf16, with_f16,
};

fn split_slice(master: &[f32], high: &mut [u16], low: &mut [u16]) {
    let layout = layout(Dtype::Bf16, Format::Split);
    encode_live(&layout, master, cast_slice_mut(high));
    encode_exact(&layout, master, cast_slice_mut(low));
}

fn join_slice(high: &[u16], low: &[u16], master: &mut [f32]) {
    let layout = layout(Dtype::Bf16, Format::Split);
    carry_exact(&layout, cast_slice(low), master);
    join_live(&layout, cast_slice(high), master);
}

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

/// The magnitudes that round to a bf16 of that magnitude, half away from zero, as `(smallest, first beyond)`: the
/// definition of rounding to nearest, in double precision.
fn rounding_interval(magnitude: u16) -> (f64, f64) {
    // Beyond the largest finite value the spacing goes on: 2^128 stands where infinity is.
    let value = |bits: u16| {
        if bits == 0x7f80 {
            2.0_f64.powi(128)
        } else {
            f64::from(bf16::from_bits(bits).to_f32())
        }
    };
    let below = if magnitude == 0 {
        0.0
    } else {
        f64::midpoint(value(magnitude - 1), value(magnitude))
    };
    let beyond = if magnitude == 0x7f80 {
        f64::INFINITY
    } else {
        f64::midpoint(value(magnitude), value(magnitude + 1))
    };
    (below, beyond)
}

#[test]
fn every_pair_joins_to_a_value_that_rounds_to_its_high_half() {
    let lows: Vec<u16> = (0..=u16::MAX).collect();
    let mut joined = vec![0.0_f32; lows.len()];
    for high in 0..=u16::MAX {
        join_slice(&vec![high; lows.len()], &lows, &mut joined);
        let sign = high & 0x8000 != 0;
        let wrong = if bf16::from_bits(high).is_nan() {
            joined.iter().position(|value| !value.is_nan())
        } else {
            let (below, beyond) = rounding_interval(high & 0x7fff);
            joined.iter().position(|value| {
                let magnitude = f64::from(value.abs());
                let inside = magnitude >= below && (magnitude < beyond || beyond.is_infinite());
                !inside || value.is_sign_negative() != sign
            })
        };
        assert!(
            wrong.is_none(),
            "high {high:#06x} low {:#06x} gives {:#010x}",
            wrong.unwrap_or(0),
            joined[wrong.unwrap_or(0)].to_bits()
        );
    }
}

#[test]
fn every_master_but_a_nan_keeps_its_bits() {
    let (mut high, mut low) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut back = vec![0.0; 1 << 16];
    for upper in 0..=u16::MAX {
        let masters: Vec<f32> = (0..=u16::MAX)
            .map(|lower| f32::from_bits((u32::from(upper) << 16) | u32::from(lower)))
            .collect();
        split_slice(&masters, &mut high, &mut low);
        join_slice(&high, &low, &mut back);
        let same = |(master, back): (&f32, &f32)| {
            master.to_bits() == back.to_bits() || master.is_nan() && back.to_bits() == 0x7fc0_0000
        };
        assert!(
            masters.iter().zip(&back).all(same),
            "masters from {upper:#06x}0000"
        );
    }
}

/// What a changed live weight leaves of its master: written out from the definition, beside the bits.
#[test]
fn a_live_weight_beside_its_master_stands_where_it_was_changed() {
    let mut random = Random::new(7);
    for live in 0..=u16::MAX {
        for _ in 0..16 {
            let master = f32::from_bits(random.bits() as u32);
            let master = if master.is_nan() { f32::NAN } else { master };
            let taken = with_bf16(master, live);
            let nan = bf16::from_bits(live).is_nan();
            assert_eq!(bf16_half_up(taken), if nan { 0x7fc0 } else { live });
            // The format that keeps halves, whose high half was overwritten, comes to the same.
            assert_eq!(taken.to_bits(), join(live, split(master).1).to_bits());
            if !master.is_nan() {
                let unchanged = with_bf16(master, bf16_half_up(master));
                assert_eq!(unchanged.to_bits(), master.to_bits());
            }

            let (taken, value) = (with_f16(master, live), f16::from_bits(live).to_f32());
            if f16::from_f32(master).to_bits() == live {
                assert!(taken.to_bits() == master.to_bits() || value.is_nan());
            } else {
                assert!(taken.to_bits() == value.to_bits() || value.is_nan() && taken.is_nan());
            }
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
