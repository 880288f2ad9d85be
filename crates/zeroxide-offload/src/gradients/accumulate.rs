//! Gradients on their way from autograd into the buffer that the step reads.

use std::collections::HashMap;
use std::ops::Not;

use zeroxide_layout::Dtype;
use zeroxide_optim::{
    Accumulate, AccumulateStats, Grad, GradMut, Pool, accumulate, measure as measure_values,
};

use crate::core::{Core, byte_range, to_usize};
use crate::error::{Result, misuse};
use crate::gradients::kept::KeptGradients;

/// Elements a task accumulates. Fixed, so that the order of the sums does not depend on the number of threads.
const PIECE: usize = 256 << 10;

/// The global gradient norm, in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradNorm {
    /// Sum of squares over all gradients kept, summed in unit and parameter order.
    pub sum_squares: f64,
    /// Some gradient holds an infinity or a NaN.
    pub nonfinite: bool,
    /// Parameters with a gradient.
    pub accumulated: usize,
}

impl GradNorm {
    /// Counts one parameter's part.
    pub(crate) fn add(&mut self, part: AccumulateStats) {
        self.sum_squares += part.sum_squares;
        self.nonfinite |= part.nonfinite;
    }
}

/// Adds one part's to the sum of a parameter.
pub(crate) fn add(total: &mut AccumulateStats, part: AccumulateStats) {
    total.sum_squares += part.sum_squares;
    total.nonfinite |= part.nonfinite;
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
        let (away, dtype) = self.open_arrival("accumulate", unit, param)?;
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
            this.grad.bytes_mut()
        }
        .expect("an arrival was opened");
        let bytes = &mut buffer[byte_range(&(offset..offset + len), dtype.size())];
        // A later part goes on with the sum over the pieces: a gradient that comes in parts of whole pieces has the bits
        // of one that comes whole.
        let before = if start == 0 {
            AccumulateStats::default()
        } else {
            state.norm
        };
        let norm = norm && !away;
        let accumulated = accumulate_pieces(&self.pool, dtype, bytes, source, mode, norm, before);
        if !away {
            state.norm = accumulated;
        }
        if start + len == numel {
            state.arrived(away);
        } else {
            state.arriving = Some((start + len, mode));
        }
        Ok(())
    }

    /// Adds to some rows of one parameter's gradient; all others are as they were, or zero if none has been
    /// accumulated.
    ///
    /// `source` holds one row of `numel / count` elements for each of `rows`, where `count` is the number of rows of the
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
        let (away, dtype) = self.open_arrival("accumulate_rows", unit, param)?;
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
            this.grad.bytes_mut()
        }
        .expect("an arrival was opened");
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
        state.arrived(away);
        if !away {
            state.norm = measure(&self.pool, dtype, bytes);
        }
        Ok(())
    }

    /// Where the first gradient of a parameter since the last step may be put by who brings it there itself: (address,
    /// bytes), in the dtype in which gradients are kept. `None` where one has been accumulated, to which the next is
    /// added, where other ranks have a part in it, or where gradients wait on disk.
    ///
    /// The room is the caller's until [`gradient_arrived`](Self::gradient_arrived), or until a gradient comes by
    /// [`accumulate`](Self::accumulate) or gradients are forgotten: nothing writes there from then on but the core.
    pub(crate) fn gradient_room(
        &mut self,
        unit: usize,
        param: usize,
    ) -> Result<Option<(usize, usize)>> {
        let (away, dtype) = self.open_arrival("gradient_room", unit, param)?;
        let this = &mut self.units[unit];
        let (offset, numel) = (this.layout.offset(param), this.layout.numel(param));
        let state = &mut this.params[param];
        // What may leave memory before it has arrived is accumulated as it comes.
        if away || state.has_arrived(away) || !matches!(this.grad, KeptGradients::Host(_)) {
            return Ok(None);
        }
        state.arriving = Some((numel, Accumulate::Store));
        let buffer = this.grad.bytes_mut().expect("an arrival was opened");
        let bytes = &mut buffer[byte_range(&(offset..offset + numel), dtype.size())];
        Ok(Some((bytes.as_mut_ptr().expose_provenance(), bytes.len())))
    }

    /// A gradient lies where [`gradient_room`](Self::gradient_room) said, and its norm is taken.
    pub(crate) fn gradient_arrived(&mut self, unit: usize, param: usize) -> Result<()> {
        self.check_param("gradient_arrived", unit, param)?;
        let this = &mut self.units[unit];
        let (offset, numel) = (this.layout.offset(param), this.layout.numel(param));
        let state = &mut this.params[param];
        if state.arriving != Some((numel, Accumulate::Store)) {
            return misuse(
                "gradient_arrived",
                format!("nobody has room for {} parameter {param}", this.name),
            );
        }
        let dtype = self.gradients.dtype;
        let buffer = this.grad.bytes_mut().expect("there was room in it");
        let bytes = &mut buffer[byte_range(&(offset..offset + numel), dtype.size())];
        state.norm = measure(&self.pool, dtype, bytes);
        state.arrived(false);
        Ok(())
    }

    /// What every arrival from autograd begins with: the parameter takes part, the step is done with the unit, and there
    /// is memory for the gradient. Returns whether that is the room for other ranks, and the dtype in it.
    fn open_arrival(
        &mut self,
        call: &'static str,
        unit: usize,
        param: usize,
    ) -> Result<(bool, Dtype)> {
        self.weights.check_strays()?;
        self.check_param(call, unit, param)?;
        self.check_here(call, unit)?;
        self.check_not_begun(call, unit)?;
        self.catch_up(unit)?;
        self.finish_unit(unit)?;
        self.retire_step()?;
        let away = self.mesh.world() > 1;
        let trainable = self.units[unit].params[param].trainable;
        if away && trainable {
            self.make_room(unit)?;
        } else if trainable {
            self.bring_gradients(unit)?;
        }
        let this = &self.units[unit];
        let present = if away {
            this.outgoing.is_some()
        } else {
            this.grad.bytes().is_some()
        };
        if !trainable || !present {
            return misuse(
                call,
                format!("{} parameter {param} is frozen or lent", this.name),
            );
        }
        Ok((
            away,
            if away {
                self.gradients.comm_dtype
            } else {
                self.gradients.dtype
            },
        ))
    }

    /// The norm of all gradients that have been accumulated; complete only if each was last accumulated with `norm`.
    /// With several ranks,
    /// this rank's part of it.
    pub(crate) fn grad_norm(&self) -> GradNorm {
        if self.mesh.world() > 1 {
            return self.shard_norm();
        }
        let params = self.units.iter().flat_map(|unit| &unit.params);
        let found = params.filter(|param| param.has_gradient());
        let mut total = GradNorm::default();
        for param in found {
            total.add(param.norm);
            total.accumulated += 1;
        }
        total
    }

    /// Forgets all gradients.
    pub(crate) fn clear_gradients(&mut self) {
        self.forget_strays();
        for param in self.units.iter_mut().flat_map(|unit| &mut unit.params) {
            param.forget_gradient();
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
    pool: &Pool,
    dtype: Dtype,
    bytes: &mut [u8],
    source: Grad<'_>,
    mode: Accumulate,
    norm: bool,
    before: AccumulateStats,
) -> AccumulateStats {
    let len = grad_len(&source);
    in_pieces(pool, dtype, bytes, before, |index, piece| {
        let start = index * PIECE;
        let part = grad_slice(&source, start..len.min(start + PIECE));
        accumulate(grad_mut(dtype, piece), part, mode, norm)
    })
}

/// The norm of what lies in a gradient buffer, with the bits that accumulating it whole would give.
pub(crate) fn measure(pool: &Pool, dtype: Dtype, bytes: &mut [u8]) -> AccumulateStats {
    in_pieces(
        pool,
        dtype,
        bytes,
        AccumulateStats::default(),
        |_, piece| measure_values(as_grad(dtype, piece)),
    )
}

/// Works on `bytes` piece by piece on all threads, and adds what each piece gives to `total` in their order.
fn in_pieces(
    pool: &Pool,
    dtype: Dtype,
    bytes: &mut [u8],
    mut total: AccumulateStats,
    work: impl Fn(usize, &mut [u8]) -> AccumulateStats + Sync,
) -> AccumulateStats {
    let pieces = bytes.chunks_mut(PIECE * dtype.size());
    let mut found = vec![AccumulateStats::default(); pieces.len()];
    let tasks = pieces.zip(&mut found).collect();
    pool.run_each(tasks, |index, (piece, stats)| *stats = work(index, piece));
    for stats in found {
        add(&mut total, stats);
    }
    total
}
