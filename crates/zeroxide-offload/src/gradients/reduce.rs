//! Gradients between ranks: every rank's gradients of a unit go out, and each rank sums those of its shard.
//!
//! The sum is taken in fp32 in the order of the ranks, scaled, and then stored in or added to the gradients kept, with
//! this rank's part of the global norm taken in the same pass. Whatever carried the bytes, the bits are the same.

use std::ops::Range;

use zeroxide_layout::{Dtype, UnitLayout};
use zeroxide_memory::Lease;
use zeroxide_optim::{Accumulate, AccumulateStats, Pool, accumulate, sum_scaled};

use crate::core::{Core, byte_range, to_usize};
use crate::error::{Result, misuse};
use crate::gradients::accumulate::{GradNorm, add, as_grad, grad_mut};
use crate::gradients::transport::GradientTransport;
use crate::unit::{Gradient, ParamState, Unit};

/// Elements that one task sums: fixed, so that the order of the norm's sums does not depend on the number of threads.
const PIECE: u64 = 256 << 10;
/// Elements summed before they are accumulated, small enough to stay in the first-level cache.
const BLOCK: usize = 4096;

impl Core {
    /// Ends the unit's part of this backward: its gradients go out, zero where none has arrived.
    ///
    /// Where the caller carries them, he finds them through [`outgoing`](Self::outgoing).
    pub(crate) fn send(&mut self, unit: usize) -> Result<()> {
        self.check_usable()?;
        self.check_unit("send", unit)?;
        let collective = matches!(
            self.gradients.transport,
            GradientTransport::Collective { .. }
        );
        if self.units[unit].layout.trainable_len() == 0 {
            return misuse("send", format!("unit {} is frozen", self.units[unit].name));
        }
        if collective {
            self.make_room(unit)?;
        }
        let element = self.gradients.comm_dtype.size();
        let this = &mut self.units[unit];
        for (param, state) in this.params.iter_mut().enumerate() {
            if let (false, Some(outgoing)) = (state.has_arrived(true), this.outgoing.as_mut()) {
                let start = this.layout.offset(param);
                let range = start..start + this.layout.numel(param);
                outgoing[byte_range(&range, element)].fill(0);
            }
            state.left();
        }
        if let (true, Some(outgoing)) = (self.gradients.quantised, this.outgoing.as_mut()) {
            clear_padding(&this.layout, outgoing, element);
        }
        if let GradientTransport::Shared { reducer, .. } = &mut self.gradients.transport {
            reducer.send(unit, this.outgoing.take())?;
        }
        Ok(())
    }

    /// Sums the unit's gradients if every rank has sent them. Returns whether it did.
    pub(crate) fn receive(&mut self, unit: usize) -> Result<bool> {
        self.check_usable()?;
        self.check_unit("receive", unit)?;
        let GradientTransport::Shared { reducer, .. } = &self.gradients.transport else {
            return misuse("receive", "nothing is shared with other ranks");
        };
        if !reducer.is_ready(unit) {
            return Ok(false);
        }
        self.finish_unit(unit)?;
        self.bring_gradients(unit)?;
        let (comm_dtype, grad, scale) = (
            self.gradients.comm_dtype,
            self.gradients.dtype,
            self.gradients.reduce_scale,
        );
        let GradientTransport::Shared { reducer, .. } = &mut self.gradients.transport else {
            return Ok(false);
        };
        let (this, pool) = (&mut self.units[unit], &self.pool);
        let range = byte_range(&this.summed(), comm_dtype.size());
        reducer.take(unit, range, |sources| {
            let present: Vec<&[u8]> = sources.iter().copied().flatten().collect();
            reduce_into(pool, this, &present, comm_dtype, grad, scale)
        })?;
        Ok(true)
    }

    /// Address and bytes of what the unit sends, sealed by [`send`](Self::send) and valid until
    /// [`receive_from`](Self::receive_from).
    pub(crate) fn outgoing(&self, unit: usize) -> Result<(usize, usize)> {
        self.check_unit("outgoing", unit)?;
        match &self.units[unit].outgoing {
            Some(lease) => Ok((lease.as_ptr().expose_provenance(), lease.len())),
            None => misuse("outgoing", "the unit has not been sent"),
        }
    }

    /// Sums what the caller has brought to [`incoming`](Self::incoming), with this rank's own in its place among them.
    pub(crate) fn receive_from(&mut self, unit: usize) -> Result<()> {
        self.check_usable()?;
        self.check_unit("receive_from", unit)?;
        self.finish_unit(unit)?;
        self.bring_gradients(unit)?;
        let (comm_dtype, grad, scale) = (
            self.gradients.comm_dtype,
            self.gradients.dtype,
            self.gradients.reduce_scale,
        );
        let this = &mut self.units[unit];
        let own = byte_range(&this.summed(), comm_dtype.size());
        let (outgoing, incoming) = (this.outgoing.take(), this.incoming.take());
        // The only rank that trains it has nothing to receive.
        let complete = incoming.is_some() || this.mesh.world() == 1;
        let (Some(outgoing), true) = (outgoing, complete) else {
            return misuse(
                "receive_from",
                format!("unit {} has not been sent and received", this.name),
            );
        };
        let mut sources: Vec<&[u8]> = incoming
            .iter()
            .flat_map(|incoming| incoming.chunks(own.len()))
            .collect();
        sources.insert(this.mesh.groups.rank as usize, &outgoing[own]);
        reduce_into(&self.pool, this, &sources, comm_dtype, grad, scale)
    }

    /// Takes the sums over all ranks, not yet scaled, of the elements that this rank sums. What the unit has sent is let
    /// go.
    pub(crate) fn receive_sum(&mut self, unit: usize, sums: &[f32]) -> Result<()> {
        self.check_usable()?;
        self.check_unit("receive_sum", unit)?;
        self.finish_unit(unit)?;
        self.bring_gradients(unit)?;
        let (grad, scale) = (self.gradients.dtype, self.gradients.reduce_scale);
        let this = &mut self.units[unit];
        let summed = this.summed();
        if this.outgoing.take().is_none() || to_usize(summed.end - summed.start) != sums.len() {
            return misuse(
                "receive_sum",
                format!(
                    "{} sums of unit {}: expected it to have been sent, and {} of them",
                    sums.len(),
                    this.name,
                    summed.end - summed.start
                ),
            );
        }
        let sources = [bytemuck::cast_slice(sums)];
        reduce_into(&self.pool, this, &sources, Dtype::F32, grad, scale)
    }

    /// Address and bytes of the gradients that this rank keeps of the unit.
    pub(crate) fn kept_gradients(&self, unit: usize) -> Result<(usize, usize)> {
        self.check_unit("kept_gradients", unit)?;
        match self.units[unit].grad.bytes() {
            Some(lease) => Ok((lease.as_ptr().expose_provenance(), lease.len())),
            None => misuse(
                "kept_gradients",
                format!("unit {} keeps none", self.units[unit].name),
            ),
        }
    }

    /// Which trainable parameters have had a gradient since the last step, in the order of units and parameters.
    pub(crate) fn accumulated(&self) -> Vec<bool> {
        let params = self.units.iter().flat_map(|unit| &unit.params);
        params
            .filter(|param| param.trainable)
            .map(ParamState::has_gradient)
            .collect()
    }

    /// Sets that to what holds over all ranks.
    pub(crate) fn set_accumulated(&mut self, accumulated: &[bool]) -> Result<()> {
        let params = self.units.iter_mut().flat_map(|unit| &mut unit.params);
        let trainable: Vec<_> = params.filter(|param| param.trainable).collect();
        if trainable.len() != accumulated.len() {
            return misuse(
                "set_accumulated",
                format!(
                    "{} of {} trainable parameters",
                    accumulated.len(),
                    trainable.len()
                ),
            );
        }
        for (param, accumulated) in trainable.into_iter().zip(accumulated) {
            match (*accumulated, param.gradient) {
                (false, _) => param.gradient = Gradient::Missing,
                (true, Gradient::Missing) => param.gradient = Gradient::Kept,
                (true, _) => {}
            }
        }
        Ok(())
    }

    /// This rank's part of the global norm: that of its shard of what was reduced.
    pub(crate) fn shard_norm(&self) -> GradNorm {
        let mut total = GradNorm::default();
        for unit in &self.units {
            total.accumulated += unit
                .params
                .iter()
                .filter(|param| param.has_gradient())
                .count();
            for param in unit.params.iter().filter(|_| !unit.fresh) {
                total.add(param.norm);
            }
        }
        total
    }
}

/// Makes everything zero that belongs to no parameter.
fn clear_padding(layout: &UnitLayout, bytes: &mut [u8], element: usize) {
    let mut end = 0;
    for piece in layout.params_in(0..layout.trainable_len()) {
        bytes[byte_range(&(end..piece.range.start), element)].fill(0);
        end = piece.range.end;
    }
    bytes[byte_range(&(end..layout.trainable_len()), element)].fill(0);
}

/// One stretch of a parameter, summed by one task.
struct Task<'a> {
    param: usize,
    /// Elements of the layout.
    range: Range<u64>,
    /// Counts for this rank's part of the norm.
    normed: bool,
    target: &'a mut [u8],
    stats: AccumulateStats,
}

/// Sums `sources`, each the bytes of the elements that this rank sums, into its gradients. The norm is that of its
/// slice.
fn reduce_into(
    pool: &Pool,
    unit: &mut Unit,
    sources: &[&[u8]],
    comm_dtype: Dtype,
    dtype: Dtype,
    scale: f32,
) -> Result<()> {
    if sources.is_empty() {
        return Ok(());
    }
    let mode = if unit.fresh {
        Accumulate::Store
    } else {
        Accumulate::Add
    };
    let (kept, summed) = (unit.kept(), unit.summed());
    // Slice by slice, whoever sums them, so that the sums of a norm are over the same elements in the same order.
    let slices: Vec<(Range<u64>, bool)> = (0..unit.layout.world())
        .map(|each| (unit.layout.trainable_shard(each), each == unit.mesh.slice()))
        .filter(|(slice, _)| summed.start <= slice.start && slice.end <= summed.end)
        .collect();
    let Some(grad) = unit.grad.bytes_mut() else {
        return misuse("receive", format!("unit {} keeps no gradients", unit.name));
    };
    let mut tasks = divide(&unit.layout, &slices, kept.start, dtype, grad);
    pool.run_each(tasks.iter_mut().collect(), |_, task: &mut Task<'_>| {
        task.run(sources, summed.start, (comm_dtype, dtype), mode, scale);
    });
    let found: Vec<_> = tasks
        .into_iter()
        .map(|task| (task.param, task.stats))
        .collect();
    for param in &mut unit.params {
        param.norm = AccumulateStats::default();
    }
    for (param, stats) in found {
        add(&mut unit.params[param].norm, stats);
    }
    unit.fresh = false;
    Ok(())
}

fn divide<'a>(
    layout: &UnitLayout,
    slices: &[(Range<u64>, bool)],
    base: u64,
    dtype: Dtype,
    grad: &'a mut Lease,
) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    let mut rest: &mut [u8] = grad;
    let mut at = base;
    for (slice, normed) in slices {
        for piece in layout.params_in(slice.clone()) {
            let mut start = piece.range.start;
            while start < piece.range.end {
                let end = (start + PIECE).min(piece.range.end);
                let (_, from) = rest.split_at_mut(to_usize(start - at) * dtype.size());
                let (target, after) = from.split_at_mut(to_usize(end - start) * dtype.size());
                tasks.push(Task {
                    param: piece.param,
                    range: start..end,
                    normed: *normed,
                    target,
                    stats: AccumulateStats::default(),
                });
                rest = after;
                at = end;
                start = end;
            }
        }
    }
    tasks
}

impl Task<'_> {
    fn run(
        &mut self,
        sources: &[&[u8]],
        base: u64,
        (comm_dtype, dtype): (Dtype, Dtype),
        mode: Accumulate,
        scale: f32,
    ) {
        let mut sum = [0.0_f32; BLOCK];
        let len = to_usize(self.range.end - self.range.start);
        let first = to_usize(self.range.start - base);
        let mut at = 0;
        while at < len {
            let count = BLOCK.min(len - at);
            let from = (first + at) * comm_dtype.size()..(first + at + count) * comm_dtype.size();
            let blocks: Vec<_> = sources
                .iter()
                .map(|source| as_grad(comm_dtype, &source[from.clone()]))
                .collect();
            sum_scaled(&mut sum[..count], &blocks, scale);
            let target = &mut self.target[at * dtype.size()..(at + count) * dtype.size()];
            let summed = zeroxide_optim::Grad::F32(&sum[..count]);
            let stats = accumulate(grad_mut(dtype, target), summed, mode, self.normed);
            add(&mut self.stats, stats);
            at += count;
        }
    }
}
