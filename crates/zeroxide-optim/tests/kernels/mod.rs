//! Adam over slices of numbers, as the tests of its arithmetic call it.

#![allow(dead_code, reason = "each test file uses its own part")]

use bytemuck::cast_slice_mut;
use zeroxide_layout::{Dtype, Format, StateLayout};
use zeroxide_optim::{AdamParams, Grad, Isa, Optimizer, Step, isa, update_with};

/// The constants of one step of Adam.
#[derive(Clone, Copy)]
pub(crate) struct AdamStep(pub(crate) Step);

impl AdamStep {
    pub(crate) fn new(params: &AdamParams, step: u64, grad_scale: f64) -> Self {
        Self(Optimizer::from(*params).prepare(step, grad_scale))
    }
}

/// The live weights beside an fp32 master.
pub(crate) enum LowOut<'a> {
    None,
    Bf16(&'a mut [u16]),
    F16(&'a mut [u16]),
}

/// The state of Adam in a format.
pub(crate) fn layout(compute: Dtype, format: Format) -> StateLayout {
    let moments = Optimizer::from(AdamParams::default()).moments();
    StateLayout::new(compute, format, &moments).expect("they go together")
}

pub(crate) fn step_fp32(
    step: &AdamStep,
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: Grad<'_>,
    out: LowOut<'_>,
) {
    step_fp32_with(isa(), step, master, exp_avg, exp_avg_sq, grad, out);
}

pub(crate) fn step_fp32_with(
    isa: Isa,
    step: &AdamStep,
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: Grad<'_>,
    out: LowOut<'_>,
) {
    let (compute, live): (_, Option<&mut [u8]>) = match out {
        LowOut::None => (Dtype::F32, None),
        LowOut::Bf16(out) => (Dtype::Bf16, Some(cast_slice_mut(out))),
        LowOut::F16(out) => (Dtype::F16, Some(cast_slice_mut(out))),
    };
    let full = [master, exp_avg, exp_avg_sq].map(cast_slice_mut);
    let tensors = live.into_iter().chain(full);
    update_with(isa, &step.0, &layout(compute, Format::Fp32), tensors, grad);
}

pub(crate) fn step_split_with(
    isa: Isa,
    step: &AdamStep,
    high: &mut [u16],
    low: &mut [u16],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: Grad<'_>,
) {
    let tensors = [
        cast_slice_mut(high),
        cast_slice_mut(low),
        cast_slice_mut(exp_avg),
        cast_slice_mut(exp_avg_sq),
    ];
    let layout = layout(Dtype::Bf16, Format::Split);
    update_with(isa, &step.0, &layout, tensors, grad);
}
