//! What holds for every rule: the bits do not depend on the instruction set, on where slices begin and end, or on which
//! format holds the state; an edited live weight counts; a NaN is the canonical one.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is rounded on purpose"
)]

mod random;

use bytemuck::{cast_slice, cast_slice_mut};
use random::Random;
use zeroxide_layout::{Dtype, Format, StateLayout};
use zeroxide_optim::{
    AdamParams, Grad, Isa, LionParams, Optimizer, SgdParams, carry_exact, encode_exact,
    encode_live, isa, join_live, update_with,
};

const LEN: usize = 2003;
const CANONICAL: u32 = 0x7fc0_0000;

/// Every rule as it comes and with the hyperparameters that choose other arithmetic.
fn optimizers() -> Vec<Optimizer> {
    let mut all = Optimizer::every();
    all.push(Optimizer::from(AdamParams {
        decoupled: false,
        ..AdamParams::default()
    }));
    all.push(Optimizer::from(LionParams {
        weight_decay: 0.1,
        lr: 0.01,
        ..LionParams::default()
    }));
    all.push(Optimizer::from(SgdParams {
        momentum: 0.9,
        nesterov: true,
        weight_decay: 0.01,
        ..SgdParams::default()
    }));
    all
}

/// The tensors of a tile, as bytes, in the order of `layout`.
#[derive(Clone)]
struct Tile {
    layout: StateLayout,
    tensors: Vec<Vec<u8>>,
}

impl Tile {
    fn new(optimizer: &Optimizer, compute: Dtype, format: Format, weights: &[f32]) -> Self {
        let layout =
            StateLayout::new(compute, format, &optimizer.moments()).expect("they go together");
        let mut random = Random::new(7);
        let mut tensors = Vec::new();
        for (index, tensor) in layout.tensors().iter().enumerate() {
            let mut bytes = vec![0; tensor.byte_range(&(0..weights.len() as u64)).len()];
            match (index, tensor.role) {
                (0, _) => encode_live(&layout, weights, &mut bytes),
                (_, zeroxide_layout::Role::Exact) => encode_exact(&layout, weights, &mut bytes),
                _ => {
                    for value in cast_slice_mut::<u8, f32>(&mut bytes) {
                        *value = (1e-3 * random.normal()).abs() as f32;
                    }
                }
            }
            tensors.push(bytes);
        }
        Self { layout, tensors }
    }

    fn step(&mut self, isa: Isa, optimizer: &Optimizer, step: u64, grad: &[f32], cuts: &[usize]) {
        let prepared = optimizer.prepare(step, 0.7);
        for pair in cuts.windows(2) {
            let parts =
                self.tensors
                    .iter_mut()
                    .zip(self.layout.tensors())
                    .map(|(bytes, tensor)| {
                        &mut bytes[tensor.byte_range(&(pair[0] as u64..pair[1] as u64))]
                    });
            let grad = Grad::F32(&grad[pair[0]..pair[1]]);
            update_with(isa, &prepared, &self.layout, parts, grad);
        }
    }

    /// The exact weights, as bits.
    fn weights(&self) -> Vec<u32> {
        let mut values = vec![0.0; self.tensors[0].len() / self.layout.compute().size()];
        if self.layout.exact().is_some() {
            carry_exact(&self.layout, &self.tensors[1], &mut values);
        }
        join_live(&self.layout, &self.tensors[0], &mut values);
        values.iter().map(|value| value.to_bits()).collect()
    }

    fn moments(&self) -> &[Vec<u8>] {
        &self.tensors[self.layout.tensors().len() - self.layout.moments().count()..]
    }
}

fn numbers(seed: u64, size: f64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..LEN)
        .map(|_| match random.below(40) {
            0 => 0.0,
            1 => -0.0,
            2 => f32::from_bits(random.bits() as u32),
            _ => (size * random.normal()) as f32,
        })
        .collect()
}

fn layouts() -> [(Dtype, Format); 4] {
    [
        (Dtype::F32, Format::Fp32),
        (Dtype::Bf16, Format::Fp32),
        (Dtype::F16, Format::Fp32),
        (Dtype::Bf16, Format::Split),
    ]
}

#[test]
fn neither_instruction_set_nor_slice_boundaries_show() {
    let (weights, grad) = (numbers(1, 0.02), numbers(2, 1e-3));
    for optimizer in optimizers() {
        for (compute, format) in layouts() {
            let start = Tile::new(&optimizer, compute, format, &weights);
            let run = |isa: Isa, cuts: &[usize]| {
                let mut tile = start.clone();
                for step in 1..=3 {
                    tile.step(isa, &optimizer, step, &grad, cuts);
                }
                tile.tensors
            };
            let expected = run(Isa::Baseline, &[0, LEN]);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                for cuts in [vec![0, LEN], vec![0, 1, 17, 64, 1000, LEN]] {
                    assert!(
                        run(isa, &cuts) == expected,
                        "{optimizer:?} {compute} {format} {isa:?} cut at {cuts:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_format_gives_the_weights_and_moments_of_fp32() {
    let (weights, grad) = (numbers(3, 0.02), numbers(4, 1e-3));
    for optimizer in optimizers() {
        let run = |compute, format| {
            let mut tile = Tile::new(&optimizer, compute, format, &weights);
            for step in 1..=4 {
                tile.step(isa(), &optimizer, step, &grad, &[0, LEN]);
            }
            (tile.weights(), tile.moments().to_vec())
        };
        // A NaN that is given has any payload as an fp32 weight until the first update.
        let expected = run(Dtype::F32, Format::Fp32);
        for (compute, format) in layouts() {
            assert!(
                run(compute, format) == expected,
                "{optimizer:?} {compute} {format}"
            );
        }
    }
}

#[test]
fn an_edited_live_weight_is_the_same_master_in_both_formats() {
    let weights: Vec<f32> = numbers(5, 0.02)
        .into_iter()
        .map(|value| if value.is_nan() { 1.0 } else { value })
        .collect();
    let grad = numbers(6, 1e-3);
    for optimizer in optimizers() {
        let run = |format, edit: bool| {
            let mut tile = Tile::new(&optimizer, Dtype::Bf16, format, &weights);
            if edit {
                let live: &mut [u16] = cast_slice_mut(&mut tile.tensors[0]);
                for value in live.iter_mut().step_by(3) {
                    *value ^= 0x0180;
                }
            }
            tile.step(isa(), &optimizer, 2, &grad, &[0, LEN]);
            (tile.weights(), tile.moments().to_vec())
        };
        assert!(
            run(Format::Fp32, true) == run(Format::Split, true),
            "{optimizer:?}"
        );
        assert!(
            run(Format::Fp32, true) != run(Format::Fp32, false),
            "{optimizer:?}"
        );
    }
}

#[test]
fn every_nan_is_the_canonical_one() {
    let mut weights = vec![0.5_f32; 8];
    let mut grad = vec![0.25_f32; 8];
    weights[1] = f32::from_bits(0xff80_1234);
    grad[2] = f32::from_bits(0xffc0_0001);
    for optimizer in optimizers() {
        for (compute, format) in layouts() {
            let mut tile = Tile::new(&optimizer, compute, format, &weights);
            tile.step(isa(), &optimizer, 1, &grad, &[0, 8]);
            let found = tile.weights();
            for (index, bits) in found.iter().enumerate() {
                let nan = f32::from_bits(*bits).is_nan();
                assert_eq!(nan, index == 1 || index == 2, "{optimizer:?} {index}");
                assert!(!nan || *bits == CANONICAL, "{optimizer:?} {bits:#x}");
            }
            for moment in tile.moments() {
                for bits in cast_slice::<u8, u32>(moment) {
                    let nan = f32::from_bits(*bits).is_nan();
                    assert!(!nan || *bits == CANONICAL, "{optimizer:?} {bits:#x}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "more tensors than")]
fn a_tensor_that_the_rule_does_not_have_is_refused() {
    let optimizer = Optimizer::from(LionParams::default());
    let mut tile = Tile::new(
        &AdamParams::default().into(),
        Dtype::F32,
        Format::Fp32,
        &[1.0; 8],
    );
    tile.step(isa(), &optimizer, 1, &[0.0; 8], &[0, 8]);
}

#[test]
fn state_tensors_carry_the_names_of_torch_and_deepspeed() {
    for (rule, expected) in [
        ("adam", vec!["exp_avg", "exp_avg_sq"]),
        ("lion", vec!["exp_avg"]),
        ("adagrad", vec!["sum"]),
        ("sgd", vec!["momentum_buffer"]),
    ] {
        let every = Optimizer::every();
        let found = every.iter().find(|each| each.name() == rule);
        let names: Vec<&str> = found
            .expect("a rule of that name")
            .moments()
            .iter()
            .map(|moment| moment.key.name())
            .collect();
        assert_eq!(names, expected, "{rule}");
    }
}
