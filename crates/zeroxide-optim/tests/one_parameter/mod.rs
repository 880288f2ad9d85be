//! The state of one parameter in a format that rounds, and updates of it.

use zeroxide_layout::{Dtype, Format, Role, StateLayout};
use zeroxide_optim::{
    Draw, Grad, Isa, Optimizer, carry_exact, decode_moment, encode_exact, encode_live, join_live,
    update_drawn_with,
};

use crate::random::Random;

/// A tile of one parameter.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Tile {
    pub(crate) layout: StateLayout,
    pub(crate) tensors: Vec<Vec<u8>>,
}

impl Tile {
    pub(crate) fn new(optimizer: &Optimizer, format: Format, weights: &[f32]) -> Self {
        let layout = StateLayout::new(Dtype::Bf16, format, &optimizer.moments()).expect("bf16");
        let tensors = layout
            .tensors()
            .iter()
            .map(|tensor| {
                let mut bytes = vec![0; tensor.byte_range(&(0..weights.len() as u64)).len()];
                match tensor.role {
                    Role::Live => encode_live(&layout, weights, &mut bytes),
                    Role::Exact => encode_exact(&layout, weights, &mut bytes),
                    Role::Moment => {}
                }
                bytes
            })
            .collect();
        Self { layout, tensors }
    }

    /// One update, cut at `cuts`, each a multiple of a block but the last.
    pub(crate) fn step(
        &mut self,
        isa: Isa,
        optimizer: &Optimizer,
        draw: Draw,
        grad: &[f32],
        cuts: &[usize],
    ) {
        let step = optimizer.prepare(draw.updates + 1, 0.7);
        for pair in cuts.windows(2) {
            let elements = pair[0] as u64..pair[1] as u64;
            let tensors = self
                .tensors
                .iter_mut()
                .zip(self.layout.tensors())
                .map(|(bytes, tensor)| &mut bytes[tensor.byte_range(&elements)]);
            let draw = Draw {
                first: draw.first + elements.start,
                ..draw
            };
            let grad = Grad::F32(&grad[pair[0]..pair[1]]);
            update_drawn_with(isa, &step, &self.layout, tensors, grad, draw);
        }
    }

    pub(crate) fn weights(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.tensors[0].len() / 2];
        carry_exact(&self.layout, &self.tensors[1], &mut values);
        join_live(&self.layout, &self.tensors[0], &mut values);
        values
    }

    pub(crate) fn moments(&self) -> Vec<Vec<f32>> {
        let kept = self.layout.moments().zip(&self.tensors[2..]);
        kept.map(|(tensor, bytes)| {
            let mut values = vec![0.0; self.tensors[0].len() / 2];
            decode_moment(tensor, bytes, &mut values);
            values
        })
        .collect()
    }
}

/// Numbers of that size with zeros, and some far smaller and larger, among them.
pub(crate) fn numbers(seed: u64, len: usize, size: f64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len)
        .map(|_| match random.below(30) {
            0 => 0.0,
            1 => (size * 1e-30 * random.normal()) as f32,
            2 => (size * 100.0 * random.normal()) as f32,
            _ => (size * random.normal()) as f32,
        })
        .collect()
}
