//! The streaming optimizer step: while tile k is updated, tiles after it are being read and tiles before it written.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};

use zeroxide_layout::{Component, PAGE};
use zeroxide_memory::Lease;
use zeroxide_optim::{AdamParams, AdamStep};
use zeroxide_storage::{Completion, StorageError};

use crate::core::{Core, byte_range, receive, to_usize};
use crate::error::{OffloadError, Result, misuse};
use crate::gather::block;
use crate::unit::{StateBlocks, Unit};
use crate::update::{Update, update_tile};
use crate::weights::Weights;

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Tiles updated.
    pub tiles: u64,
    /// Elements that got a new value, padding included.
    pub elements: u64,
}

/// Elements that share every constant of the update.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) range: Range<u64>,
    pub(crate) step: AdamStep,
}

/// One tile on its way through the ring.
struct TileJob {
    unit: usize,
    tile: u32,
    /// Components that come from and go back to the disk through staging memory.
    buffers: Vec<(Component, Lease)>,
    pending: usize,
    failed: Option<StorageError>,
}

/// Tiles between their first read and their update, oldest first.
struct Pipeline {
    jobs: VecDeque<TileJob>,
    /// Number of the oldest job; tags of reads are counted from the first one.
    base: u64,
    writes: usize,
    reads: (Sender<Completion>, Receiver<Completion>),
}

const WRITE: u64 = 1 << 63;
const COMPONENT_SHIFT: u32 = 56;

impl Core {
    /// One update of every parameter whose gradient has landed. `grad_scale` multiplies the gradients.
    ///
    /// After an error the state is mixed and every further call says so.
    pub(crate) fn step(&mut self, groups: &[AdamParams], grad_scale: f64) -> Result<StepReport> {
        self.check_usable()?;
        if self.fill.is_some() {
            return misuse("step", "a fill has not been committed");
        }
        self.cache.clear();
        self.settle_arrivals()?;
        let mut plans = Vec::with_capacity(self.units.len());
        for unit in &self.units {
            plans.push(segments(unit, groups, grad_scale)?);
        }
        self.steps += 1;
        let outcome = self.stream(&plans);
        if let Err(error) = &outcome {
            self.poisoned = Some((self.steps, error.to_string()));
            return outcome;
        }
        for param in self.units.iter_mut().flat_map(|unit| &mut unit.params).filter(|param| param.landed) {
            param.updates += 1;
        }
        for (unit, plan) in self.units.iter_mut().zip(&plans) {
            if let StateBlocks::Disk { moments_are_zero } = &mut unit.state
                && !plan.is_empty()
            {
                *moments_are_zero = false;
            }
        }
        self.clear_gradients();
        outcome
    }

    fn stream(&mut self, plans: &[Vec<Segment>]) -> Result<StepReport> {
        let mut work: VecDeque<(usize, u32)> = VecDeque::new();
        for (unit, plan) in plans.iter().enumerate().filter(|(_, plan)| !plan.is_empty()) {
            let tiles = &self.units[unit].state_tiles;
            // A unit whose moments are not on disk yet must have all its tiles written, also those without a gradient.
            let all = matches!(self.units[unit].state, StateBlocks::Disk { moments_are_zero: true });
            work.extend((0..tiles.count()).filter(|tile| all || overlaps(plan, &tiles.range(*tile))).map(|t| (unit, t)));
        }
        let mut pipeline = Pipeline { jobs: VecDeque::new(), base: 0, writes: 0, reads: channel() };
        let mut report = StepReport::default();
        let mut outcome = Ok(());
        while outcome.is_ok() && (!work.is_empty() || !pipeline.jobs.is_empty()) {
            outcome = self.advance(plans, &mut work, &mut pipeline, &mut report);
        }
        // Whatever happened, no buffer is given up before the disk is done with it.
        while pipeline.writes > 0 || pipeline.jobs.iter().any(|job| job.pending > 0) {
            let drained = pipeline.receive(&mut self.waited);
            if outcome.is_ok() {
                outcome = drained;
            } else if matches!(drained, Err(OffloadError::Misuse { .. })) {
                break;
            }
        }
        outcome.map(|()| report)
    }

    /// Starts as many reads as the ring has room for, then updates the oldest tile and starts its writes.
    fn advance(
        &mut self,
        plans: &[Vec<Segment>],
        work: &mut VecDeque<(usize, u32)>,
        pipeline: &mut Pipeline,
        report: &mut StepReport,
    ) -> Result<()> {
        while let Some((unit, tile)) = work.front().copied() {
            if !self.start_reads(unit, tile, pipeline)? {
                break;
            }
            work.pop_front();
        }
        let Some(oldest) = pipeline.jobs.front_mut() else {
            // No room for a single tile: writes still hold the ring.
            return pipeline.receive(&mut self.waited);
        };
        if oldest.pending > 0 {
            return pipeline.receive(&mut self.waited);
        }
        if let Some(error) = oldest.failed.take() {
            return Err(error.into());
        }
        let mut job = pipeline.jobs.pop_front().expect("looked at above");
        pipeline.base += 1;
        let range = self.units[job.unit].state_tiles.range(job.tile);
        let update = Update {
            pool: &self.pool,
            layout: self.state_layout,
            store: self.disk.as_ref().map(|disk| &disk.store),
            grad: self.grad,
            unit: job.unit,
            tile: job.tile,
        };
        let checksums = update_tile(&update, &mut self.units[job.unit], &mut job.buffers, &plans[job.unit])?;
        report.tiles += 1;
        report.elements += range.end - range.start;
        self.start_writes(job, &checksums, pipeline)
    }

    /// Takes staging memory for the tile and starts reading into it; false where the ring is full.
    fn start_reads(&self, unit: usize, tile: u32, pipeline: &mut Pipeline) -> Result<bool> {
        let this = &self.units[unit];
        let mut buffers = Vec::new();
        let mut to_read = Vec::new();
        let zero = matches!(this.state, StateBlocks::Disk { moments_are_zero: true });
        for (component, size) in self.state_layout.components() {
            let elements = match component {
                Component::Weight if !this.weights.on_disk() || this.weights.in_memory() => continue,
                Component::Weight => this.weight_tiles.range(tile),
                _ if matches!(this.state, StateBlocks::Host { .. }) => continue,
                _ => this.state_tiles.range(tile),
            };
            let bytes = to_usize(elements.end - elements.start) * size;
            let Ok(lease) = self.disk().ring.lease(bytes, PAGE) else { return Ok(false) };
            let is_zero = zero && matches!(component, Component::ExpAvg | Component::ExpAvgSq);
            if is_zero {
                let mut lease = lease;
                lease.fill(0);
                buffers.push((*component, lease));
            } else {
                to_read.push((*component, lease));
            }
        }
        let mut job = TileJob { unit, tile, buffers, pending: 0, failed: None };
        let number = pipeline.base + pipeline.jobs.len() as u64;
        for (component, lease) in to_read {
            let tag = number | ((component as u64) << COMPONENT_SHIFT);
            self.disk().store.start_read(block(unit, component), tile, lease, tag, &pipeline.reads.0).map_err(|(error, _)| error)?;
            job.pending += 1;
        }
        pipeline.jobs.push_back(job);
        Ok(true)
    }

    fn start_writes(&self, job: TileJob, checksums: &[(Component, u64)], pipeline: &mut Pipeline) -> Result<()> {
        let this = &self.units[job.unit];
        let mut outgoing = job.buffers;
        if let Weights::Disk { window, .. } = &this.weights
            && this.weights.in_memory()
        {
            let bytes = byte_range(&this.weight_tiles.range(job.tile), self.compute.size());
            outgoing.push((Component::Weight, window.lease(bytes)?));
        }
        for (component, lease) in outgoing {
            let checksum = checksums
                .iter()
                .find(|(found, _)| *found == component)
                .map_or_else(|| zeroxide_storage::checksum(&lease), |(_, checksum)| *checksum);
            let id = block(job.unit, component);
            let store = &self.disk().store;
            store.start_write_with_crc(id, job.tile, lease, checksum, WRITE, &pipeline.reads.0).map_err(|(error, _)| error)?;
            pipeline.writes += 1;
        }
        Ok(())
    }
}

impl Pipeline {
    /// Takes one completion: a buffer goes back to its tile, or to the ring after a write.
    fn receive(&mut self, waited: &mut std::time::Duration) -> Result<()> {
        let completion = receive(&self.reads.1, waited)?;
        if completion.tag & WRITE != 0 {
            self.writes -= 1;
            return completion.result.map_err(Into::into);
        }
        let number = completion.tag & ((1 << COMPONENT_SHIFT) - 1);
        let Some(job) = usize::try_from(number - self.base).ok().and_then(|index| self.jobs.get_mut(index)) else {
            return misuse("step", format!("a completion for tile job {number} that is not under way"));
        };
        job.pending -= 1;
        match completion.result {
            Ok(()) => job.buffers.push((component_of(completion.tag), completion.buffer)),
            Err(error) => {
                job.failed.get_or_insert(error);
            }
        }
        Ok(())
    }
}

fn component_of(tag: u64) -> Component {
    let number = (tag & !WRITE) >> COMPONENT_SHIFT;
    [Component::Weight, Component::Residual, Component::Master, Component::ExpAvg, Component::ExpAvgSq]
        .into_iter()
        .find(|component| *component as u64 == number)
        .expect("tags are made from components")
}

/// The runs of equal constants among the parameters whose gradient has landed, in layout order.
///
/// Padding between two of them joins the run: its gradient, weight and moments are zero and stay zero.
fn segments(unit: &Unit, groups: &[AdamParams], grad_scale: f64) -> Result<Vec<Segment>> {
    let mut order: Vec<usize> = (0..unit.params.len()).filter(|param| unit.params[*param].landed).collect();
    order.sort_by_key(|param| unit.layout.offset(*param));
    let mut found: Vec<(usize, u64, Range<u64>, usize)> = Vec::new();
    for param in order {
        let state = &unit.params[param];
        let Some(_) = groups.get(state.group) else {
            return misuse("step", format!("{} is in group {} of {}", unit.name, state.group, groups.len()));
        };
        let start = unit.layout.offset(param);
        let range = start..start + unit.layout.numel(param);
        match found.last_mut() {
            Some((group, updates, run, last))
                if *group == state.group
                    && *updates == state.updates
                    && range.start - run.end < zeroxide_layout::PARAM_ALIGN =>
            {
                run.end = range.end;
                *last = param;
            }
            _ => found.push((state.group, state.updates, range, param)),
        }
    }
    Ok(found
        .into_iter()
        .map(|(group, updates, range, _)| Segment { range, step: AdamStep::new(&groups[group], updates + 1, grad_scale) })
        .collect())
}

fn overlaps(plan: &[Segment], range: &Range<u64>) -> bool {
    plan.iter().any(|segment| segment.range.start < range.end && range.start < segment.range.end)
}
