//! One step of a rule with one tensor of its own, over fp32 weights.

use bytemuck::cast_slice_mut;
use zeroxide_layout::{Dtype, Format, StateLayout};
use zeroxide_optim::{Grad, Optimizer, isa, update_with};

/// The largest relative error of one rounding to fp32.
pub(crate) const UNIT: f64 = 1.0 / 16_777_216.0;

/// (weight, moment) after one step from each (weight, moment, gradient).
pub(crate) fn run(
    optimizer: &Optimizer,
    step: u64,
    scale: f64,
    starts: &[[f32; 3]],
) -> Vec<[f32; 2]> {
    let column = |index: usize| {
        starts
            .iter()
            .map(|start| start[index])
            .collect::<Vec<f32>>()
    };
    let (mut weight, mut moment, grad) = (column(0), column(1), column(2));
    let layout =
        StateLayout::new(Dtype::F32, Format::Fp32, &optimizer.moments()).expect("they go together");
    let tensors = [cast_slice_mut(&mut weight), cast_slice_mut(&mut moment)];
    update_with(
        isa(),
        &optimizer.prepare(step, scale),
        &layout,
        tensors,
        Grad::F32(&grad),
    );
    weight
        .into_iter()
        .zip(moment)
        .map(|(weight, moment)| [weight, moment])
        .collect()
}

/// Asserts that `got` is `expected` up to `bound`, or to the smallest fp32 number where that is larger.
pub(crate) fn within(got: f32, expected: f64, bound: f64) {
    let error = (f64::from(got) - expected).abs();
    let bound = bound.max(f64::from(f32::MIN_POSITIVE));
    assert!(
        error <= bound,
        "{got:e} is {error:e} from {expected:e}, at most {bound:e} are allowed"
    );
}
