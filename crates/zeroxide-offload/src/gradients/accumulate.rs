//! Gradients on their way from autograd into the buffer that the step reads.

use std::collections::HashMap;
use std::ops::Not;
use std::sync::Mutex;

use zeroxide_layout::Dtype;
use zeroxide_optim::{Accumulate, AccumulateStats, Grad, GradMut, accumulate};

use crate::core::{Core, byte_range, to_usize};
use crate::error::{Result, misuse};

/// Elements a task accumulates. Fixed, so that the order of the sums does not depend on the number of threads.
const PIECE: usize = 256 << 10;

/// The global gradient norm, in parts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradNorm {
    /// Sum of squares over all gradients kept, summed in unit and parameter order.
    pub sum_squares: f64,
    /// Some gradient holds an infinity or a NaN.
    pub nonfinite: bool,
    /// Parameters with a gradient.
    pub accumulated: usize,
}

impl Core {
    /// Takes elements `start..` of one parameter's gradient: stored if it is the first since the last step, added
    /// otherwise. With `norm`, the sum of squares of the result is taken in the same pass.
    ///
    /// A gradient comes whole or in parts, in order and without gaps; it has been accumulated once its last element
    /// has.
    pub(crate) fn accumulate(
        &mut self,
        unit: usize,
        param: usize,
        start: u64,
        source: Grad<'_>,
        norm: bool,
    ) -> Result<()> {
        self.check_strays()?;
        self.check_param("accumulate", unit, param)?;
        self.finish_unit(unit)?;
        self.retire_step()?;
        let away = self.arrives_away(unit, param)?;
        let dtype = if away { self.comm_dtype } else { self.grad };
        let this = &mut self.units[unit];
        let offset = this.layout.offset(param) + start;
        let numel = this.layout.numel(param);
        let len = grad_len(&source) as u64;
        let state = &mut this.params[param];
        let (expected, mode) = match state.arriving {
            Some((next, mode)) if start > 0 => (next, mode),
            _ if state.has_arrived(away) => (0, Accumulate::Add),
            _ => (0, Accumulate::Store),
        };
        if start != expected || start + len > numel {
            return misuse(
                "accumulate",
                format!(
                    "{} parameter {param} has {numel} gradient elements and expects {expected}.. next, got {start}..{}",
                    this.name,
                    start + len
                ),
            );
        }
        let buffer = if away {
            this.outgoing.as_mut()
        } else {
            this.grad.as_mut()
        };
        let Some(buffer) = buffer.filter(|_| state.trainable) else {
            return misuse(
                "accumulate",
                format!("{} parameter {param} is frozen or lent", this.name),
            );
        };
        let bytes = &mut buffer[byte_range(&(offset..offset + len), dtype.size())];
        let accumulated = accumulate_pieces(&self.pool, dtype, bytes, source, mode, norm && !away);
        if !away {
            if start == 0 {
                state.sum_squares = 0.0;
                state.nonfinite = false;
            }
            state.sum_squares += accumulated.sum_squares;
            state.nonfinite |= accumulated.nonfinite;
        }
        let complete = start + len == numel;
        state.arriving = if complete {
            None
        } else {
            Some((start + len, mode))
        };
        state.accumulated |= complete;
        state.sent |= away && complete;
        Ok(())
    }

    /// Adds to some rows of one parameter's gradient; all others are as they were, or zero if none has been
    /// accumulated.
    ///
    /// `source` holds one row of `numel / count` elements for each of `rows`, where `count` is the number of rows of
    /// the
    /// parameter. Rows named more than once are summed first, in their order, in the dtype of the gradient: the bits of
    /// torch's dense embedding gradient.
    pub(crate) fn accumulate_rows(
        &mut self,
        unit: usize,
        param: usize,
        count: u64,
        rows: &[i64],
        source: Grad<'_>,
    ) -> Result<()> {
        self.check_strays()?;
        self.check_param("accumulate_rows", unit, param)?;
        self.finish_unit(unit)?;
        self.retire_step()?;
        let away = self.arrives_away(unit, param)?;
        let dtype = if away { self.comm_dtype } else { self.grad };
        let this = &mut self.units[unit];
        let offset = this.layout.offset(param);
        let numel = this.layout.numel(param);
        let width = to_usize(numel / count.max(1));
        let state = &mut this.params[param];
        if width as u64 * count != numel || grad_len(&source) != rows.len() * width {
            return misuse(
                "accumulate_rows",
                format!(
                    "{} rows of {} parameter {param}: {} elements in {count} rows of {width}, got {}",
                    rows.len(),
                    this.name,
                    numel,
                    grad_len(&source)
                ),
            );
        }
        let buffer = if away {
            this.outgoing.as_mut()
        } else {
            this.grad.as_mut()
        };
        let Some(buffer) = buffer.filter(|_| state.trainable) else {
            return misuse(
                "accumulate_rows",
                format!("{} parameter {param} is frozen or lent", this.name),
            );
        };
        let bytes = &mut buffer[byte_range(&(offset..offset + numel), dtype.size())];
        let bad = rows
            .iter()
            .find(|row| u64::try_from(**row).is_ok_and(|row| row < count).not());
        if let Some(row) = bad {
            return misuse(
                "accumulate_rows",
                format!("row {row} of {count} in {} parameter {param}", this.name),
            );
        }
        if !state.has_arrived(away) {
            bytes.fill(0);
        }
        let stride = width * dtype.size();
        for (row, sum) in sum_rows(dtype, rows, &source, width) {
            let at = row * stride;
            let target = grad_mut(dtype, &mut bytes[at..at + stride]);
            accumulate(target, as_grad(dtype, &sum), Accumulate::Add, false);
        }
        state.accumulated = true;
        state.sent = away;
        if !away {
            let measured = measure(&self.pool, dtype, bytes);
            state.sum_squares = measured.sum_squares;
            state.nonfinite = measured.nonfinite;
        }
        Ok(())
    }

    /// Whether a gradient from autograd goes into the room for other ranks, which is then there.
    fn arrives_away(&mut self, unit: usize, param: usize) -> Result<bool> {
        let away = self.mesh.world > 1;
        if away && self.units[unit].params[param].trainable {
            self.make_room(unit)?;
        }
        Ok(away)
    }

    /// The norm of all gradients that have been accumulated; complete only if each was last accumulated with `norm`.
    /// With several ranks,
    /// this rank's part of it.
    pub(crate) fn grad_norm(&self) -> GradNorm {
        if self.mesh.world > 1 {
            return self.shard_norm();
        }
        let mut total = GradNorm {
            sum_squares: 0.0,
            nonfinite: false,
            accumulated: 0,
        };
        for param in self
            .units
            .iter()
            .flat_map(|unit| &unit.params)
            .filter(|param| param.accumulated)
        {
            total.sum_squares += param.sum_squares;
            total.nonfinite |= param.nonfinite;
            total.accumulated += 1;
        }
        total
    }

    /// Forgets all gradients.
    pub(crate) fn clear_gradients(&mut self) {
        self.forget_strays();
        for param in self.units.iter_mut().flat_map(|unit| &mut unit.params) {
            param.accumulated = false;
            param.sent = false;
            param.arriving = None;
            param.sum_squares = 0.0;
            param.nonfinite = false;
        }
        for unit in &mut self.units {
            unit.fresh = true;
        }
    }
}

/// A gradient in memory of its own.
pub(crate) enum GradCopy {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    F16(Vec<u16>),
}

impl GradCopy {
    pub(crate) fn of(source: &Grad<'_>) -> Self {
        match source {
            Grad::F32(values) => Self::F32(values.to_vec()),
            Grad::Bf16(values) => Self::Bf16(values.to_vec()),
            Grad::F16(values) => Self::F16(values.to_vec()),
        }
    }

    pub(crate) fn grad(&self) -> Grad<'_> {
        match self {
            Self::F32(values) => Grad::F32(values),
            Self::Bf16(values) => Grad::Bf16(values),
            Self::F16(values) => Grad::F16(values),
        }
    }
}

/// Where a gradient begins.
pub(crate) fn address_of(grad: &Grad<'_>) -> usize {
    match grad {
        Grad::F32(values) => values.as_ptr() as usize,
        Grad::Bf16(values) | Grad::F16(values) => values.as_ptr() as usize,
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

/// Bytes as a gradient.
pub(crate) fn as_grad(dtype: Dtype, bytes: &[u8]) -> Grad<'_> {
    match dtype {
        Dtype::F32 => Grad::F32(bytemuck::cast_slice(bytes)),
        Dtype::Bf16 => Grad::Bf16(bytemuck::cast_slice(bytes)),
        Dtype::F16 => Grad::F16(bytemuck::cast_slice(bytes)),
    }
}

/// The sum of the rows of `source` that belong to each distinct row, in the order in which those first appear.
fn sum_rows(dtype: Dtype, rows: &[i64], source: &Grad<'_>, width: usize) -> Vec<(usize, Vec<u8>)> {
    let mut place: HashMap<i64, usize> = HashMap::new();
    let mut sums: Vec<(usize, Vec<u8>)> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let part = grad_slice(source, index * width..(index + 1) * width);
        let next = sums.len();
        let at = *place.entry(*row).or_insert(next);
        let mode = if at == next {
            Accumulate::Store
        } else {
            Accumulate::Add
        };
        if at == next {
            sums.push((
                usize::try_from(*row).expect("checked against the row count"),
                vec![0; width * dtype.size()],
            ));
        }
        accumulate(grad_mut(dtype, &mut sums[at].1), part, mode, false);
    }
    sums
}

/// Bytes of a gradient buffer as its elements.
pub(crate) fn grad_mut(dtype: Dtype, bytes: &mut [u8]) -> GradMut<'_> {
    match dtype {
        Dtype::F32 => GradMut::F32(bytemuck::cast_slice_mut(bytes)),
        Dtype::Bf16 => GradMut::Bf16(bytemuck::cast_slice_mut(bytes)),
        Dtype::F16 => GradMut::F16(bytemuck::cast_slice_mut(bytes)),
    }
}

fn accumulate_pieces(
    pool: &zeroxide_optim::Pool,
    dtype: Dtype,
    bytes: &mut [u8],
    source: Grad<'_>,
    mode: Accumulate,
    norm: bool,
) -> AccumulateStats {
    let len = grad_len(&source);
    if len <= PIECE {
        return accumulate(grad_mut(dtype, bytes), source, mode, norm);
    }
    let pieces: Vec<_> = bytes
        .chunks_mut(PIECE * dtype.size())
        .map(|piece| Mutex::new((piece, AccumulateStats::default())))
        .collect();
    pool.run(pieces.len(), |index| {
        let mut guard = pieces[index].lock().expect("each task has its own piece");
        let start = index * PIECE;
        let part = grad_slice(&source, start..len.min(start + PIECE));
        let (piece, stats) = &mut *guard;
        *stats = accumulate(grad_mut(dtype, piece), part, mode, norm);
    });
    let mut total = AccumulateStats::default();
    for piece in pieces {
        let (_, stats) = piece.into_inner().expect("the pool has returned");
        total.sum_squares += stats.sum_squares;
        total.nonfinite |= stats.nonfinite;
    }
    total
}

/// The norm of what lies in a gradient buffer, with the bits that accumulating it whole would give.
pub(crate) fn measure(
    pool: &zeroxide_optim::Pool,
    dtype: Dtype,
    bytes: &mut [u8],
) -> AccumulateStats {
    let pieces: Vec<_> = bytes
        .chunks_mut(PIECE * dtype.size())
        .map(|piece| Mutex::new((piece, AccumulateStats::default())))
        .collect();
    pool.run(pieces.len(), |index| {
        let mut guard = pieces[index].lock().expect("each task has its own piece");
        let (piece, stats) = &mut *guard;
        let copy = piece.to_vec();
        *stats = accumulate(
            grad_mut(dtype, piece),
            as_grad(dtype, &copy),
            Accumulate::Store,
            true,
        );
    });
    let mut total = AccumulateStats::default();
    for piece in pieces {
        let (_, stats) = piece.into_inner().expect("the pool has returned");
        total.sum_squares += stats.sum_squares;
        total.nonfinite |= stats.nonfinite;
    }
    total
}
