//! The streaming optimizer step: while tile k is updated, tiles after it are being read and tiles before it written.
//!
//! A step need not end before the next forward begins: a unit's update must only be done when the unit is next used.
//! [`Core::step_begin`] plans the step and starts its first reads; every later use of a unit drives the stream until
//! that unit is done, in the order in which the units are used, so that the disk works while the model computes. The
//! numbers do not depend on when that happens: a tile's update reads only that tile.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use zeroxide_layout::{Component, PAGE};
use zeroxide_memory::Lease;
use zeroxide_optim::{AdamParams, AdamStep};
use zeroxide_storage::{Completion, StorageError};

use crate::core::{Core, byte_range, receive, to_usize};
use crate::error::{Result, misuse};
use crate::gather::block;
use crate::unit::{StateBlocks, Unit};
use crate::update::{Update, update_tile};
use crate::weights::{Residence, Weights};

/// Elements that share every constant of the update.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) range: Range<u64>,
    pub(crate) step: AdamStep,
}

/// One tile on its way through memory.
struct TileJob {
    unit: usize,
    tile: u32,
    /// Components that come from and go back to the disk: in the staging ring, or in the unit's window.
    buffers: Vec<(Component, Lease)>,
    pending: usize,
    failed: Option<StorageError>,
}

/// What is left to do for one unit.
#[derive(Default)]
struct Progress {
    plan: Vec<Segment>,
    /// Tiles not yet updated.
    tiles: usize,
    /// Writes not yet completed.
    writes: usize,
    /// Every tile of the unit takes part, so its weights can be read straight into its window.
    whole: bool,
}

/// A step that has begun.
pub(crate) struct ActiveStep {
    units: Vec<Progress>,
    /// Tiles not yet begun.
    work: VecDeque<(usize, u32)>,
    /// Tiles between their first read and their update, oldest first.
    jobs: VecDeque<TileJob>,
    /// Number of the oldest job; tags of reads are counted from the first one.
    base: u64,
    writes: usize,
    replies: (Sender<Completion>, Receiver<Completion>),
}

const WRITE: u64 = 1 << 63;
const COMPONENT_SHIFT: u32 = 56;

impl Core {
    /// Begins one update of every parameter whose gradient has landed; `grad_scale` multiplies the gradients.
    ///
    /// Where nothing is at home on disk, the step is done when this returns. After an error the state is mixed and
    /// every further call says so.
    pub(crate) fn step_begin(&mut self, groups: &[AdamParams], grad_scale: f64) -> Result<()> {
        self.check_usable()?;
        if self.fill.is_some() {
            return misuse("step", "a fill has not been committed");
        }
        self.finish_step()?;
        self.check_exchanged()?;
        self.cache.clear();
        self.settle_arrivals()?;
        let mut step = ActiveStep {
            units: Vec::with_capacity(self.units.len()),
            work: VecDeque::new(),
            jobs: VecDeque::new(),
            base: 0,
            writes: 0,
            replies: channel(),
        };
        let (mut untouched, mut others) = (Vec::new(), Vec::new());
        for (index, unit) in self.units.iter().enumerate() {
            let plan = segments(unit, groups, grad_scale)?;
            // Moments that are not on disk yet must all be written, also where there is no gradient.
            let all = matches!(
                unit.state,
                StateBlocks::Disk {
                    moments_are_zero: true
                }
            ) && !plan.is_empty();
            let count = unit.state_tiles.count();
            let tiles: Vec<u32> = (0..count)
                .filter(|tile| all || overlaps(&plan, &unit.flat(&unit.state_tiles.range(*tile))))
                .collect();
            step.work.extend(tiles.iter().map(|tile| (index, *tile)));
            let whole = tiles.len() as u64 == u64::from(unit.weight_tiles.count());
            match (tiles.is_empty(), plan.is_empty()) {
                (true, true) => untouched.push(index),
                // This rank's shard may hold none of the parameters that are updated: padding, or others of the unit.
                (true, false) => others.push(index),
                _ => {}
            }
            step.units.push(Progress {
                plan,
                tiles: tiles.len(),
                writes: 0,
                whole,
            });
        }
        self.steps += 1;
        for param in self
            .units
            .iter_mut()
            .flat_map(|unit| &mut unit.params)
            .filter(|param| param.landed)
        {
            param.updates += 1;
        }
        self.clear_gradients();
        for unit in untouched {
            self.weights_kept(unit);
        }
        for unit in others {
            self.weights_renewed(unit);
        }
        self.step = Some(step);
        if self.disk.is_none() {
            return self.finish_step();
        }
        let started = self.start_all_reads();
        self.settle_outcome(started)
    }

    /// With several ranks, what a step uses has been summed over them: otherwise it would use what an earlier step left.
    fn check_exchanged(&self) -> Result<()> {
        if self.place.world == 1 {
            return Ok(());
        }
        let missed = |unit: &&Unit| unit.fresh && unit.params.iter().any(|param| param.landed);
        match self.units.iter().find(missed) {
            Some(unit) => misuse(
                "step",
                format!(
                    "gradients of unit {} have not been exchanged with the other ranks: the last backward before a step \
                     must be outside of no_sync, and start from an output of the engine",
                    unit.name
                ),
            ),
            None => Ok(()),
        }
    }

    /// Ends the step that has begun, if there is one.
    pub(crate) fn finish_step(&mut self) -> Result<()> {
        self.drive(|step| step.writes == 0 && step.is_updated(), Core::advance)?;
        self.retire_step()
    }

    /// Notes, without waiting, what the disk has done; where nothing is left, the step ends and the staging ring gives its
    /// memory back: backward, which needs the most of it, does not use the ring.
    pub(crate) fn retire_step(&mut self) -> Result<()> {
        let Some(step) = self.step.as_mut().filter(|step| step.is_updated()) else {
            return Ok(());
        };
        let mut outcome = Ok(());
        while outcome.is_ok() {
            // Only now: after an error a completion that is taken and not noted would be waited for without end.
            let Ok(completion) = step.replies.1.try_recv() else {
                break;
            };
            outcome = step.note(completion);
        }
        self.settle_outcome(outcome)?;
        if self.step.as_ref().is_some_and(|step| step.writes == 0) {
            self.step = None;
            if let Some(disk) = &self.disk {
                disk.ring.discard_if_free()?;
            }
        }
        Ok(())
    }

    /// Goes on with the step until the unit's weights in memory, if they are there, are the new ones.
    pub(crate) fn finish_unit(&mut self, unit: usize) -> Result<()> {
        self.drive(|step| step.units[unit].tiles == 0, Core::advance)
    }

    /// As [`finish_unit`](Self::finish_unit), and until all of it is on disk.
    pub(crate) fn finish_writes(&mut self, unit: usize) -> Result<()> {
        self.finish_unit(unit)?;
        self.drive(|step| step.units[unit].writes == 0, Core::step_receive)
    }

    /// Whether the step still has something to do for the unit.
    pub(crate) fn is_stepping(&self, unit: usize) -> bool {
        self.step
            .as_ref()
            .is_some_and(|step| step.units[unit].tiles > 0 || step.units[unit].writes > 0)
    }

    /// Drops what is left of the step: waits for what is in flight and forgets the rest.
    pub(crate) fn abandon_step(&mut self) {
        while self.step.as_ref().is_some_and(ActiveStep::in_flight) {
            if self.step_receive().is_err()
                && !self.step.as_ref().is_some_and(ActiveStep::in_flight)
            {
                break;
            }
        }
        self.step = None;
    }

    /// Repeats `act` until `done` says so, or until there is no step. An error ends the step for good.
    fn drive(
        &mut self,
        done: impl Fn(&ActiveStep) -> bool,
        act: impl Fn(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.check_usable()?;
        let start = Instant::now();
        let mut outcome = Ok(());
        while outcome.is_ok() && self.step.as_ref().is_some_and(|step| !done(step)) {
            let acted = act(self);
            outcome = self.settle_outcome(acted);
        }
        self.updating += start.elapsed();
        outcome
    }

    /// After an error the state is mixed: the step ends, and no buffer is given up before the disk is done with it.
    fn settle_outcome(&mut self, outcome: Result<()>) -> Result<()> {
        if let Err(error) = &outcome {
            self.poisoned.get_or_insert((self.steps, error.to_string()));
            self.abandon_step();
        }
        outcome
    }

    fn start_all_reads(&mut self) -> Result<()> {
        while let Some((unit, tile)) = self.active().work.front().copied() {
            if !self.start_reads(unit, tile)? {
                break;
            }
            self.active_mut().work.pop_front();
        }
        Ok(())
    }

    /// Starts as many reads as there is room for, then updates the oldest tile and starts its writes.
    fn advance(&mut self) -> Result<()> {
        self.start_all_reads()?;
        match self.active_mut().jobs.front_mut() {
            // No room for a single tile: writes still hold the ring. Or a tile that is still being read.
            None => return self.step_receive(),
            Some(oldest) if oldest.pending > 0 => return self.step_receive(),
            Some(oldest) => {
                if let Some(error) = oldest.failed.take() {
                    return Err(error.into());
                }
            }
        }
        let step = self
            .step
            .as_mut()
            .expect("driven only while there is a step");
        let Some(mut job) = step.jobs.pop_front() else {
            return Ok(());
        };
        step.base += 1;
        let update = Update {
            pool: &self.pool,
            layout: self.state_layout,
            store: self.disk.as_ref().map(|disk| &disk.store),
            grad: self.grad,
            unit: job.unit,
            tile: job.tile,
        };
        let unit = job.unit;
        let plan = &step.units[unit].plan;
        let checksums = update_tile(&update, &mut self.units[unit], &mut job.buffers, plan)?;
        self.tiles_updated += 1;
        self.start_writes(job, &checksums)?;
        let progress = &mut self.active_mut().units[unit];
        progress.tiles -= 1;
        if progress.tiles == 0 {
            self.unit_updated(unit)?;
        }
        Ok(())
    }

    /// The last tile of a unit has its new value.
    fn unit_updated(&mut self, unit: usize) -> Result<()> {
        if let StateBlocks::Disk { moments_are_zero } = &mut self.units[unit].state {
            *moments_are_zero = false;
            // Used up, and not needed before backward lands the next ones: room for the activations in between.
            if let Some(grad) = &mut self.units[unit].grad {
                grad.discard()?;
            }
        }
        self.clock += 1;
        let used = self.clock;
        let alone = self.place.world == 1;
        if let Some(residence) = self.residence_mut(unit)
            && matches!(residence, Residence::Updating)
        {
            *residence = Residence::Here {
                whole: alone,
                pinned: false,
                used,
            };
        }
        self.weights_renewed(unit);
        Ok(())
    }

    /// Takes memory for the tile and starts reading into it; false where there is none.
    fn start_reads(&mut self, unit: usize, tile: u32) -> Result<bool> {
        self.try_window(unit, tile)?;
        let this = &self.units[unit];
        let mut buffers = Vec::new();
        let mut to_read = Vec::new();
        let zero = matches!(
            this.state,
            StateBlocks::Disk {
                moments_are_zero: true
            }
        );
        for (component, size) in self.state_layout.components() {
            let elements = match component {
                Component::Weight if !this.weights.on_disk() || this.weights.in_memory() => {
                    continue;
                }
                Component::Weight => this.weight_tiles.range(tile),
                _ if matches!(this.state, StateBlocks::Host { .. }) => continue,
                _ => this.state_tiles.range(tile),
            };
            let bytes = byte_range(&elements, *size);
            let lease = match (component, self.residence(unit)) {
                (Component::Weight, Some(Residence::Updating)) => this
                    .weights
                    .window()
                    .expect("weights on disk have a window")
                    .lease(byte_range(&this.flat(&elements), *size))?,
                _ => match self.disk().ring.lease(bytes.len(), PAGE) {
                    Ok(lease) => lease,
                    Err(_) => return Ok(false),
                },
            };
            if zero && matches!(component, Component::ExpAvg | Component::ExpAvgSq) {
                let mut lease = lease;
                lease.fill(0);
                buffers.push((*component, lease));
            } else {
                to_read.push((*component, lease));
            }
        }
        let step = self
            .step
            .as_mut()
            .expect("driven only while there is a step");
        let number = step.base + step.jobs.len() as u64;
        step.jobs.push_back(TileJob {
            unit,
            tile,
            buffers,
            pending: 0,
            failed: None,
        });
        let at = step.jobs.len() - 1;
        for (component, lease) in to_read {
            let tag = number | ((component as u64) << COMPONENT_SHIFT);
            let store = &self
                .disk
                .as_ref()
                .expect("a block at home on disk implies a store")
                .store;
            store
                .start_read(block(unit, component), tile, lease, tag, &step.replies.0)
                .map_err(|(error, _)| error)?;
            step.jobs[at].pending += 1;
        }
        Ok(true)
    }

    /// Before the first tile of a unit that is away: frames for its window, if that takes nothing from units in use.
    /// Its weights are then updated where the next forward wants them.
    fn try_window(&mut self, unit: usize, tile: u32) -> Result<()> {
        if tile > 0
            || !self.active().units[unit].whole
            || !self.units[unit].weights.on_disk()
            || !matches!(self.residence(unit), Some(Residence::Away))
        {
            return Ok(());
        }
        if self.map_frames(unit, false)?
            && let Some(residence) = self.residence_mut(unit)
        {
            *residence = Residence::Updating;
        }
        Ok(())
    }

    fn start_writes(&mut self, job: TileJob, checksums: &[(Component, u64)]) -> Result<()> {
        let this = &self.units[job.unit];
        let mut outgoing = job.buffers;
        if let Weights::Moving {
            window, home: None, ..
        } = &this.weights
            && this.weights.in_memory()
        {
            let flat = this.flat(&this.weight_tiles.range(job.tile));
            let bytes = byte_range(&flat, self.compute.size());
            outgoing.push((Component::Weight, window.lease(bytes)?));
        }
        let step = self
            .step
            .as_mut()
            .expect("driven only while there is a step");
        for (component, lease) in outgoing {
            let (_, checksum) = checksums
                .iter()
                .find(|(found, _)| *found == component)
                .expect("taken of everything that goes to disk");
            let tag = WRITE | job.unit as u64;
            let store = &self
                .disk
                .as_ref()
                .expect("a block at home on disk implies a store")
                .store;
            store
                .start_write_with_crc(
                    block(job.unit, component),
                    job.tile,
                    lease,
                    *checksum,
                    tag,
                    &step.replies.0,
                )
                .map_err(|(error, _)| error)?;
            step.writes += 1;
            step.units[job.unit].writes += 1;
        }
        Ok(())
    }

    /// Takes one completion: a buffer goes back to its tile, or to where it came from after a write.
    fn step_receive(&mut self) -> Result<()> {
        let Self {
            step: Some(step),
            waited,
            ..
        } = self
        else {
            return Ok(());
        };
        step.receive(waited)
    }

    fn active(&self) -> &ActiveStep {
        self.step
            .as_ref()
            .expect("driven only while there is a step")
    }

    fn active_mut(&mut self) -> &mut ActiveStep {
        self.step
            .as_mut()
            .expect("driven only while there is a step")
    }
}

impl ActiveStep {
    /// Whether tiles of the unit still wait for their update.
    pub(crate) fn is_updating(&self, unit: usize) -> bool {
        self.units[unit].tiles > 0
    }

    fn is_updated(&self) -> bool {
        self.work.is_empty() && self.jobs.is_empty()
    }

    fn in_flight(&self) -> bool {
        self.writes > 0 || self.jobs.iter().any(|job| job.pending > 0)
    }

    fn receive(&mut self, waited: &mut Duration) -> Result<()> {
        let completion = receive(&self.replies.1, waited)?;
        self.note(completion)
    }

    fn note(&mut self, completion: Completion) -> Result<()> {
        if completion.tag & WRITE != 0 {
            self.writes -= 1;
            self.units[to_usize(completion.tag & !WRITE)].writes -= 1;
            return completion.result.map_err(Into::into);
        }
        let number = completion.tag & ((1 << COMPONENT_SHIFT) - 1);
        let index = number.checked_sub(self.base).map_or(usize::MAX, to_usize);
        let Some(job) = self.jobs.get_mut(index) else {
            return misuse(
                "step",
                format!("a completion for tile job {number} that is not under way"),
            );
        };
        job.pending -= 1;
        match completion.result {
            Ok(()) => job
                .buffers
                .push((component_of(completion.tag), completion.buffer)),
            Err(error) => {
                job.failed.get_or_insert(error);
            }
        }
        Ok(())
    }
}

fn component_of(tag: u64) -> Component {
    let number = (tag & !WRITE) >> COMPONENT_SHIFT;
    Component::ALL
        .into_iter()
        .find(|component| *component as u64 == number)
        .expect("tags are made from components")
}

/// The runs of equal constants among the parameters whose gradient has landed, in layout order.
///
/// Padding between two of them joins the run: its gradient, weight and moments are zero and stay zero.
fn segments(unit: &Unit, groups: &[AdamParams], grad_scale: f64) -> Result<Vec<Segment>> {
    let mut order: Vec<usize> = (0..unit.params.len())
        .filter(|param| unit.params[*param].landed)
        .collect();
    order.sort_by_key(|param| unit.layout.offset(*param));
    let mut found: Vec<(usize, u64, Range<u64>)> = Vec::new();
    for param in order {
        let state = &unit.params[param];
        if state.group >= groups.len() {
            return misuse(
                "step",
                format!(
                    "{} is in group {} of {}",
                    unit.name,
                    state.group,
                    groups.len()
                ),
            );
        }
        let start = unit.layout.offset(param);
        let range = start..start + unit.layout.numel(param);
        match found.last_mut() {
            Some((group, updates, run))
                if *group == state.group
                    && *updates == state.updates
                    && range.start - run.end < zeroxide_layout::PARAM_ALIGN =>
            {
                run.end = range.end;
            }
            _ => found.push((state.group, state.updates, range)),
        }
    }
    Ok(found
        .into_iter()
        .map(|(group, updates, range)| Segment {
            range,
            step: AdamStep::new(&groups[group], updates + 1, grad_scale),
        })
        .collect())
}

fn overlaps(plan: &[Segment], range: &Range<u64>) -> bool {
    plan.iter()
        .any(|segment| segment.range.start < range.end && range.start < segment.range.end)
}
