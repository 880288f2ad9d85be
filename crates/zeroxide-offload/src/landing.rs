//! Gradients on their way from autograd into the buffer that the step reads.

use std::sync::Mutex;

use zeroxide_layout::Dtype;
use zeroxide_optim::{Grad, GradMut, Land, LandStats, land};

use crate::core::{Core, byte_range};
use crate::error::{Result, misuse};

/// Elements a task lands. Fixed, so that the order of the sums does not depend on the number of threads.
const PIECE: usize = 256 << 10;

/// The global gradient norm, in parts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradNorm {
    /// Sum of squares over all gradients kept, summed in unit and parameter order.
    pub sum_squares: f64,
    /// Some gradient holds an infinity or a NaN.
    pub nonfinite: bool,
    /// Parameters with a gradient.
    pub landed: usize,
}

impl Core {
    /// Takes one parameter's gradient: stored if it is the first since the last step, added otherwise. With `norm`,
    /// the sum of squares of the result is taken in the same pass.
    pub(crate) fn land(&mut self, unit: usize, param: usize, source: Grad<'_>, norm: bool) -> Result<()> {
        self.check_param("land", unit, param)?;
        let dtype = self.grad;
        let this = &mut self.units[unit];
        let offset = this.layout.offset(param);
        let numel = this.layout.numel(param);
        let got = grad_len(&source);
        if got as u64 != numel {
            return misuse("land", format!("{} parameter {param} has {numel} elements, its gradient {got}", this.name));
        }
        let state = &mut this.params[param];
        let Some(buffer) = this.grad.as_mut().filter(|_| state.trainable) else {
            return misuse("land", format!("{} parameter {param} is frozen or lent", this.name));
        };
        let mode = if state.landed { Land::Add } else { Land::Store };
        let bytes = &mut buffer[byte_range(&(offset..offset + numel), dtype.size())];
        let stats = land_pieces(&self.pool, dtype, bytes, source, mode, norm);
        state.landed = true;
        if norm {
            state.sum_squares = stats.sum_squares;
            state.nonfinite = stats.nonfinite;
        }
        Ok(())
    }

    /// The norm of all gradients that have landed; complete only if each was last landed with `norm`.
    pub(crate) fn grad_norm(&self) -> GradNorm {
        let mut total = GradNorm { sum_squares: 0.0, nonfinite: false, landed: 0 };
        for param in self.units.iter().flat_map(|unit| &unit.params).filter(|param| param.landed) {
            total.sum_squares += param.sum_squares;
            total.nonfinite |= param.nonfinite;
            total.landed += 1;
        }
        total
    }

    /// Forgets all gradients.
    pub(crate) fn clear_gradients(&mut self) {
        for param in self.units.iter_mut().flat_map(|unit| &mut unit.params) {
            param.landed = false;
            param.sum_squares = 0.0;
            param.nonfinite = false;
        }
    }
}

fn grad_len(grad: &Grad<'_>) -> usize {
    match grad {
        Grad::F32(values) => values.len(),
        Grad::Bf16(values) | Grad::F16(values) => values.len(),
    }
}

/// The elements `range` of a gradient.
fn grad_slice<'a>(grad: &Grad<'a>, range: std::ops::Range<usize>) -> Grad<'a> {
    match grad {
        Grad::F32(values) => Grad::F32(&values[range]),
        Grad::Bf16(values) => Grad::Bf16(&values[range]),
        Grad::F16(values) => Grad::F16(&values[range]),
    }
}

/// Bytes of a gradient buffer as its elements.
fn grad_mut(dtype: Dtype, bytes: &mut [u8]) -> GradMut<'_> {
    match dtype {
        Dtype::F32 => GradMut::F32(bytemuck::cast_slice_mut(bytes)),
        Dtype::Bf16 => GradMut::Bf16(bytemuck::cast_slice_mut(bytes)),
        Dtype::F16 => GradMut::F16(bytemuck::cast_slice_mut(bytes)),
    }
}

fn land_pieces(
    pool: &zeroxide_optim::Pool,
    dtype: Dtype,
    bytes: &mut [u8],
    source: Grad<'_>,
    mode: Land,
    norm: bool,
) -> LandStats {
    let len = grad_len(&source);
    if len <= PIECE {
        return land(grad_mut(dtype, bytes), source, mode, norm);
    }
    let pieces: Vec<_> = bytes
        .chunks_mut(PIECE * dtype.size())
        .map(|piece| Mutex::new((piece, LandStats { sum_squares: 0.0, nonfinite: false })))
        .collect();
    pool.run(pieces.len(), |index| {
        let mut guard = pieces[index].lock().expect("each task has its own piece");
        let start = index * PIECE;
        let part = grad_slice(&source, start..len.min(start + PIECE));
        let (piece, stats) = &mut *guard;
        *stats = land(grad_mut(dtype, piece), part, mode, norm);
    });
    let mut total = LandStats { sum_squares: 0.0, nonfinite: false };
    for piece in pieces {
        let (_, stats) = piece.into_inner().expect("the pool has returned");
        total.sum_squares += stats.sum_squares;
        total.nonfinite |= stats.nonfinite;
    }
    total
}
