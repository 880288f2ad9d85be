//! The same model in a format that rounds, by one kernel call a parameter and step.

use zeroxide_layout::{Dtype, Format, Role, StateLayout};
use zeroxide_offload::Offload;
use zeroxide_optim::{
    Draw, Grad, carry_exact, decode_moment, encode_exact, encode_live, join_live, update_drawn,
};

use super::{REFERENCE_STEPS, SCALE, UNITS, gradient, hyperparameters, initial, is_unused, stream};

pub(crate) const PARTS: [&str; 3] = ["weight", "exp_avg", "exp_avg_sq"];

/// The bits of weight and moments of every trained parameter, in order.
pub(crate) fn all_values(offload: &Offload) -> Vec<u32> {
    let mut all = Vec::new();
    for (unit, params) in UNITS.iter().enumerate() {
        for (param, (numel, trainable)) in params.iter().enumerate() {
            for part in PARTS.iter().filter(|_| *trainable) {
                let values = whole(offload, unit, param, part, *numel);
                all.extend(values.iter().map(|value| value.to_bits()));
            }
        }
    }
    all
}

/// One part of a parameter.
pub(crate) fn whole(
    offload: &Offload,
    unit: usize,
    param: usize,
    part: &str,
    numel: u64,
) -> Vec<f32> {
    let mut values = vec![0.0; usize::try_from(numel).expect("small")];
    offload
        .read_param(unit, param, part, 0, &mut values)
        .expect("nothing in the way");
    values
}

/// What [`all_values`] is after [`REFERENCE_STEPS`] steps.
pub(crate) fn rounded(format: Format) -> Vec<u32> {
    let optimizer = hyperparameters();
    let layout = StateLayout::new(Dtype::Bf16, format, &optimizer.moments()).expect("bf16");
    let mut all = Vec::new();
    for (unit, params) in UNITS.iter().enumerate() {
        for (param, (numel, trainable)) in params.iter().enumerate() {
            if *trainable {
                let values = one(&layout, unit, param, *numel);
                all.extend(values.iter().flatten().map(|value| value.to_bits()));
            }
        }
    }
    all
}

fn one(layout: &StateLayout, unit: usize, param: usize, numel: u64) -> Vec<Vec<f32>> {
    let optimizer = hyperparameters();
    let weights = initial(unit, param, numel);
    let mut tensors: Vec<Vec<u8>> = layout
        .tensors()
        .iter()
        .map(|tensor| vec![0; tensor.byte_range(&(0..numel)).len()])
        .collect();
    encode_live(layout, &weights, &mut tensors[0]);
    encode_exact(layout, &weights, &mut tensors[1]);
    let mut updates = 0;
    for step in (0..REFERENCE_STEPS).filter(|step| !is_unused(*step, unit, param)) {
        let draw = Draw {
            stream: stream(unit, param as u64),
            updates,
            first: 0,
        };
        updates += 1;
        let grad = gradient(step, unit, param, numel);
        let bytes = tensors.iter_mut().map(|tensor| &mut tensor[..]);
        let prepared = optimizer.prepare(updates, SCALE);
        update_drawn(&prepared, layout, bytes, Grad::F32(&grad), draw);
    }
    let mut found = vec![vec![0.0; weights.len()]; 3];
    carry_exact(layout, &tensors[1], &mut found[0]);
    join_live(layout, &tensors[0], &mut found[0]);
    let moments = layout.tensors().iter().zip(&tensors);
    let moments = moments.filter(|(tensor, _)| tensor.role == Role::Moment);
    for ((tensor, bytes), out) in moments.zip(&mut found[1..]) {
        decode_moment(tensor, bytes, out);
    }
    found
}
