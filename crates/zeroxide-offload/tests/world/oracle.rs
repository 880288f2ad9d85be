//! Gradients by formula, and what plain loops over all of them come to.

use std::collections::HashMap;

use bytemuck::cast_slice_mut;
use zeroxide_layout::{Dtype, Format, StateLayout};
use zeroxide_optim::{AdamParams, Grad, Optimizer, bf16_half_up, bf16_to_f32, update};

use super::{FROZEN, MICRO, SCALE, STEPS, UNITS, Values};

/// Gradients of a parameter come on some ranks, in some steps, in some micro-batches only; in step 2 unit 3 has none on
/// any rank, and one small parameter has none in any odd step.
pub(super) fn has_gradient(rank: usize, step: u64, micro: u64, unit: usize, param: usize) -> bool {
    match (unit, param) {
        (3, _) => step != 2 && (rank != 0 || step != 1),
        (1, 2) => step.is_multiple_of(2),
        (1, 3) => rank % 2 == 1 || micro == 1,
        (0, 1) => rank == 0 && micro == 0,
        _ => true,
    }
}

pub(super) fn hyperparameters() -> Optimizer {
    Optimizer::from(AdamParams {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled: true,
        bias_correction: true,
    })
}

pub(super) fn initial(unit: usize, param: usize, numel: u64) -> Vec<f32> {
    noise(unit as u64 * 31 + param as u64 + 100_000, numel)
}

pub(super) fn gradient(
    rank: usize,
    step: u64,
    micro: u64,
    unit: usize,
    param: usize,
    numel: u64,
) -> Vec<f32> {
    let which = ((step * MICRO + micro) * 8 + unit as u64) * 8 + param as u64;
    noise(which * 16 + rank as u64, numel)
}

#[expect(clippy::cast_precision_loss, reason = "24 bits fit")]
/// Values in (-1, 1) by Weyl's sequence: no dependency, no two alike.
fn noise(seed: u64, numel: u64) -> Vec<f32> {
    (0..numel)
        .map(|index| {
            let mixed = (index + 1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(seed.wrapping_mul(0xd1b5_4a32_d192_ed03));
            let even = ((mixed >> 40) as f32 / (1_u64 << 23) as f32) - 1.0;
            // Over many exponents: sums of numbers of one scale would be the same in any order.
            even * even * even
        })
        .collect()
}

pub(super) fn empty() -> Values {
    let mut values = HashMap::new();
    for (unit, params) in UNITS.iter().enumerate() {
        for (param, numel) in params.iter().enumerate() {
            let numel = usize::try_from(*numel).expect("small");
            values.insert((unit, param), [(); 3].map(|()| vec![0.0; numel]));
        }
    }
    values
}

/// What the steps come to by plain loops and one kernel call a parameter and step: values, and the norms in double
/// precision.
pub(crate) fn reference(world: usize) -> (Values, Vec<f64>) {
    let mut all = empty();
    let mut norms = vec![0.0; usize::try_from(STEPS).expect("few")];
    for ((unit, param), [weight, first, second]) in &mut all {
        let (unit, param) = (*unit, *param);
        *weight = initial(unit, param, weight.len() as u64);
        if unit == FROZEN {
            // Frozen weights are kept in the compute dtype.
            for value in weight {
                *value = bf16_to_f32(bf16_half_up(*value));
            }
            continue;
        }
        let mut updates = 0;
        for step in 0..STEPS {
            let Some(grad) = summed(world, step, unit, param, weight.len() as u64) else {
                continue;
            };
            updates += 1;
            for value in &grad {
                norms[usize::try_from(step).expect("few")] += f64::from(*value) * f64::from(*value);
            }
            let optimizer = hyperparameters();
            let layout = StateLayout::new(Dtype::F32, Format::Fp32, &optimizer.moments())
                .expect("they go together");
            let tensors =
                [&mut *weight, &mut *first, &mut *second].map(|each| cast_slice_mut(each));
            update(
                &optimizer.prepare(updates, SCALE),
                &layout,
                tensors,
                Grad::F32(&grad),
            );
        }
    }
    (all, norms)
}

/// For every micro-batch the sum in rank order, in fp32, times 1 / world; those sums added up. None without any.
fn summed(world: usize, step: u64, unit: usize, param: usize, numel: u64) -> Option<Vec<f32>> {
    #[expect(clippy::cast_precision_loss, reason = "a few ranks")]
    let scale = 1.0 / world as f32;
    let mut total: Option<Vec<f32>> = None;
    for micro in 0..MICRO {
        let mut sum: Option<Vec<f32>> = None;
        for rank in (0..world).filter(|rank| has_gradient(*rank, step, micro, unit, param)) {
            let grad = gradient(rank, step, micro, unit, param, numel);
            sum = Some(match sum {
                None => grad,
                Some(sum) => sum.iter().zip(&grad).map(|(a, b)| a + b).collect(),
            });
        }
        if let Some(sum) = sum {
            let mean = sum.iter().map(|value| value * scale);
            total = Some(match total {
                None => mean.collect(),
                Some(total) => total.iter().zip(mean).map(|(a, b)| a + b).collect(),
            });
        }
    }
    total
}

/// The live weights that belong to master weights.
pub(crate) fn live_of(values: &Values) -> Vec<u16> {
    let mut live = Vec::new();
    for (unit, params) in UNITS.iter().enumerate() {
        for param in 0..params.len() {
            live.extend(
                values[&(unit, param)][0]
                    .iter()
                    .map(|value| bf16_half_up(*value)),
            );
        }
    }
    live
}
