//! Gradient accumulation: what is stored, what is measured, and that neither depends on the instruction set.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is rounded on purpose"
)]
#![allow(clippy::float_cmp, reason = "some results are exact")]

mod random;

use half::{bf16, f16};
use random::Random;
use zeroxide_optim::{
    Accumulate, AccumulateStats, Grad, GradMut, Isa, accumulate, accumulate_with, measure_with,
};

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    F32,
    Bf16,
    F16,
}

const KINDS: [Kind; 3] = [Kind::F32, Kind::Bf16, Kind::F16];

/// Elements of one dtype, as fp32 bits or as 16-bit ones.
#[derive(Clone, PartialEq, Debug)]
enum Values {
    Full(Vec<f32>),
    Low(Kind, Vec<u16>),
}

impl Values {
    fn new(kind: Kind, values: &[f32]) -> Self {
        match kind {
            Kind::F32 => Self::Full(values.to_vec()),
            Kind::Bf16 => Self::Low(
                kind,
                values
                    .iter()
                    .map(|&value| bf16::from_f32(value).to_bits())
                    .collect(),
            ),
            Kind::F16 => Self::Low(
                kind,
                values
                    .iter()
                    .map(|&value| f16::from_f32(value).to_bits())
                    .collect(),
            ),
        }
    }

    fn as_f32(&self) -> Vec<f32> {
        match self {
            Self::Full(values) => values.clone(),
            Self::Low(Kind::Bf16, bits) => bits
                .iter()
                .map(|&bits| bf16::from_bits(bits).to_f32())
                .collect(),
            Self::Low(_, bits) => bits
                .iter()
                .map(|&bits| f16::from_bits(bits).to_f32())
                .collect(),
        }
    }

    fn grad(&self) -> Grad<'_> {
        match self {
            Self::Full(values) => Grad::F32(values),
            Self::Low(Kind::Bf16, bits) => Grad::Bf16(bits),
            Self::Low(_, bits) => Grad::F16(bits),
        }
    }

    fn grad_mut(&mut self) -> GradMut<'_> {
        match self {
            Self::Full(values) => GradMut::F32(values),
            Self::Low(Kind::Bf16, bits) => GradMut::Bf16(bits),
            Self::Low(_, bits) => GradMut::F16(bits),
        }
    }
}

fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.normal() as f32).collect()
}

#[test]
fn values_are_those_of_a_plain_loop() {
    for (to, from) in KINDS
        .into_iter()
        .flat_map(|to| KINDS.map(|from| (to, from)))
    {
        for len in [0, 1, 15, 16, 17, 4096, 9999] {
            let (home, source) = (
                Values::new(to, &normal(1, len)),
                Values::new(from, &normal(2, len)),
            );
            let sums: Vec<f32> = home
                .as_f32()
                .iter()
                .zip(source.as_f32())
                .map(|(a, b)| a + b)
                .collect();
            for (mode, expected) in [
                (Accumulate::Store, source.as_f32()),
                (Accumulate::Add, sums),
            ] {
                for norm in [false, true] {
                    let mut got = home.clone();
                    accumulate(got.grad_mut(), source.grad(), mode, norm);
                    assert_eq!(
                        got,
                        Values::new(to, &expected),
                        "{from:?} to {to:?} {mode:?} {len}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_norm_is_that_of_the_values_stored() {
    for (to, from) in KINDS
        .into_iter()
        .flat_map(|to| KINDS.map(|from| (to, from)))
    {
        let mut home = Values::new(to, &normal(3, 10_000));
        let stats = accumulate(
            home.grad_mut(),
            Values::new(from, &normal(4, 10_000)).grad(),
            Accumulate::Add,
            true,
        );
        let expected: f64 = home
            .as_f32()
            .iter()
            .map(|&value| f64::from(value).powi(2))
            .sum();
        assert!(
            (stats.sum_squares / expected - 1.0).abs() < 1e-13,
            "{from:?} to {to:?}"
        );
        assert!(!stats.nonfinite);
    }
}

#[test]
fn the_order_of_the_sum_is_the_documented_one() {
    let values = normal(5, 3 * 4096 + 77);
    let mut expected = 0.0;
    for chunk in values.chunks(4096) {
        let mut lanes = [0.0_f64; 16];
        for (index, &value) in chunk.iter().enumerate() {
            lanes[index % 16] += f64::from(value) * f64::from(value);
        }
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        expected += lanes[0];
    }
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
        let mut home = vec![0.0; values.len()];
        let stats = accumulate_with(
            isa,
            GradMut::F32(&mut home),
            Grad::F32(&values),
            Accumulate::Store,
            true,
        );
        assert_eq!(
            stats.sum_squares.to_bits(),
            f64::to_bits(expected),
            "{isa:?}"
        );
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for (to, from) in KINDS
        .into_iter()
        .flat_map(|to| KINDS.map(|from| (to, from)))
    {
        let (home, source) = (
            Values::new(to, &normal(6, 5001)),
            Values::new(from, &normal(7, 5001)),
        );
        for mode in [Accumulate::Store, Accumulate::Add] {
            let run = |isa: Isa| {
                let mut home = home.clone();
                let stats = accumulate_with(isa, home.grad_mut(), source.grad(), mode, true);
                (home, stats.sum_squares.to_bits())
            };
            let expected = run(Isa::Baseline);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                assert!(run(isa) == expected, "{isa:?} {from:?} to {to:?} {mode:?}");
            }
        }
    }
}

#[test]
fn values_that_are_not_finite_are_found_anywhere() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 15, 16, 4095, 4096, 4999] {
            let mut values = normal(8, 5000);
            values[at] = bad;
            let mut home = vec![0; values.len()];
            assert!(
                accumulate(
                    GradMut::Bf16(&mut home),
                    Grad::F32(&values),
                    Accumulate::Store,
                    true
                )
                .nonfinite
            );
        }
    }
}

#[test]
fn a_value_beyond_the_home_dtype_counts_as_infinite() {
    let mut home = [0; 2];
    let stats = accumulate(
        GradMut::F16(&mut home),
        Grad::F32(&[1.0, 65520.0]),
        Accumulate::Store,
        true,
    );
    assert_eq!(home, [0x3c00, 0x7c00]);
    assert!(stats.nonfinite);
}

#[test]
fn squares_neither_overflow_nor_vanish() {
    let values = [f32::MAX, f32::MIN, f32::from_bits(1)];
    let mut home = [0.0; 3];
    let stats = accumulate(
        GradMut::F32(&mut home),
        Grad::F32(&values),
        Accumulate::Store,
        true,
    );
    assert_eq!(
        stats,
        AccumulateStats {
            sum_squares: 2.0 * f64::from(f32::MAX).powi(2),
            nonfinite: false
        }
    );
    let stats = accumulate(
        GradMut::F32(&mut home[..1]),
        Grad::F32(&values[2..]),
        Accumulate::Store,
        true,
    );
    assert_eq!(stats.sum_squares, 2.0_f64.powi(-298));
}

#[test]
#[should_panic(expected = "differ in length")]
fn slices_of_different_length_are_refused() {
    accumulate(
        GradMut::F32(&mut [0.0; 2]),
        Grad::F32(&[0.0; 3]),
        Accumulate::Store,
        false,
    );
}

/// Catches: an order of the sums other than that of accumulation, and a chunk or an end that is left out.
#[test]
fn what_lies_at_home_measures_as_if_it_had_been_stored() {
    let mut random = Random::new(11);
    for kind in KINDS {
        for len in [0, 1, 15, 16, 17, 4095, 4096, 4097, 3 * 4096 + 21] {
            let values: Vec<f32> = (0..len).map(|_| random.normal() as f32).collect();
            let values = Values::new(kind, &values);
            let mut home = values.clone();
            let stored = accumulate(home.grad_mut(), values.grad(), Accumulate::Store, true);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                assert_eq!(
                    measure_with(isa, values.grad()),
                    stored,
                    "{kind:?} {len} {isa:?}"
                );
            }
        }
        let broken = Values::new(kind, &[1.0, f32::INFINITY]);
        assert!(measure_with(Isa::Baseline, broken.grad()).nonfinite);
    }
}
