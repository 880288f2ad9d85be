//! The tiles of a step on their way through memory: while tile k is updated, tiles after it are being read and tiles
//! before it written.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use zeroxide_layout::{PAGE, Role};
use zeroxide_memory::{Activity, Lease};
use zeroxide_storage::{Completion, Notify, Reply, StorageError};

use crate::core::{Core, byte_range, to_usize};
use crate::error::{Result, misuse};
use crate::gradients::kept::GRADIENT;
use crate::homes::fill_initial;
use crate::step::plan::{Segment, tiles_of};
use crate::step::update::{Update, update_tile};
use crate::tile_io::{TileBuffer, tile_bytes};
use crate::unit::{StateBlocks, Unit};
use crate::weights::gather::block;
use crate::weights::residence::{Residence, UnitWeights};

/// Marks the tag of a write, whose low bits are the unit. Tags of reads: a tile job's number, and from `TENSOR_SHIFT`
/// on
/// the number of the state tensor in the unit's layout.
const WRITE: u64 = 1 << 63;
const TENSOR_SHIFT: u32 = 56;

/// One tile on its way through memory.
struct TileJob {
    unit: usize,
    tile: u32,
    /// State tensors, by their number in the unit's layout, that come from and go back to the disk: in the staging
    /// ring,
    /// or in the unit's window.
    buffers: Vec<(usize, Lease)>,
    pending: usize,
    failed: Option<StorageError>,
}

impl TileJob {
    /// Takes the buffer of that number out, if there is one.
    fn take(&mut self, number: usize) -> Option<Lease> {
        let at = self
            .buffers
            .iter()
            .position(|(index, _)| *index == number)?;
        Some(self.buffers.swap_remove(at).1)
    }
}

/// What is left to do for one unit.
#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) plan: Vec<Segment>,
    /// Tiles not yet updated.
    pub(crate) tiles: usize,
    /// Writes not yet completed.
    pub(crate) writes: usize,
    /// Every tile of the unit takes part, so its weights can be read straight into its window.
    pub(crate) takes_every_tile: bool,
    /// The unit has been updated and not been used since.
    pub(crate) ahead: bool,
    /// What is done makes up for steps that the unit has missed: its gradient is zero, and what it has of one stays.
    pub(crate) without_gradient: bool,
}

impl Progress {
    /// All that `plan` does with `tiles` tiles of the unit.
    pub(crate) fn new(unit: &Unit, plan: Vec<Segment>, tiles: usize) -> Self {
        Self {
            plan,
            tiles,
            writes: 0,
            takes_every_tile: tiles as u64 == u64::from(unit.weight_tiles.count()),
            ahead: false,
            without_gradient: false,
        }
    }
}

/// Why no further tile's reads were started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// All have been.
    Done,
    /// The staging ring is full.
    NoRing,
    /// The next unit's window has to wait for memory that units hold whose use is to come.
    NoFrames,
}

/// Where weights of a unit that is away go which gets no memory under its window.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lacking {
    /// Nowhere yet, if a unit's use will free memory.
    Wait,
    /// Through the staging ring; the unit is read again when it is used.
    Stage,
}

/// A step that has begun.
pub(crate) struct ActiveStep {
    pub(crate) units: Vec<Progress>,
    /// Tiles not yet begun.
    pub(crate) work: VecDeque<(usize, u32)>,
    /// Tiles between their first read and their update, oldest first.
    jobs: VecDeque<TileJob>,
    /// Number of the oldest job; tags of reads are counted from the first one.
    base: u64,
    pub(crate) writes: usize,
    replies: (Reply, Receiver<Completion>),
}

impl ActiveStep {
    /// A step of `units` in which nothing is to be done yet, whose completions are told to `notify`.
    pub(crate) fn new(notify: &Arc<Notify>, units: usize) -> Self {
        let (sender, receiver) = channel();
        Self {
            units: (0..units).map(|_| Progress::default()).collect(),
            work: VecDeque::new(),
            jobs: VecDeque::new(),
            base: 0,
            writes: 0,
            replies: (Reply::notifying(sender, Arc::clone(notify)), receiver),
        }
    }

    /// What `plan` does with the unit, of which the step has nothing left to do, comes next, with a gradient of zero.
    pub(crate) fn add_first(&mut self, index: usize, unit: &Unit, plan: Vec<Segment>) {
        let tiles = tiles_of(unit, &plan);
        for tile in tiles.iter().rev() {
            self.work.push_front((index, *tile));
        }
        self.units[index] = Progress {
            without_gradient: true,
            ..Progress::new(unit, plan, tiles.len())
        };
    }

    /// Whether tiles of the unit still wait for their update.
    pub(crate) fn is_updating(&self, unit: usize) -> bool {
        self.units[unit].tiles > 0
    }

    pub(crate) fn is_updated(&self) -> bool {
        self.work.is_empty() && self.jobs.is_empty()
    }

    pub(crate) fn in_flight(&self) -> bool {
        self.writes > 0 || self.jobs.iter().any(|job| job.pending > 0)
    }

    pub(crate) fn note(&mut self, completion: Completion) -> Result<()> {
        if completion.tag & WRITE != 0 {
            self.writes -= 1;
            self.units[to_usize(completion.tag & !WRITE)].writes -= 1;
            return completion.result.map_err(Into::into);
        }
        let number = completion.tag & ((1 << TENSOR_SHIFT) - 1);
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
                .push((tensor_of(completion.tag), completion.buffer)),
            Err(error) => {
                job.failed.get_or_insert(error);
            }
        }
        Ok(())
    }
}

impl Core {
    /// Starts as many reads as there is room for.
    pub(crate) fn start_all_reads(&mut self) -> Result<Stopped> {
        while let Some((unit, tile)) = self.active().work.front().copied() {
            match self.start_reads(unit, tile, Lacking::Wait)? {
                Stopped::Done => self.active_mut().work.pop_front(),
                stopped => return Ok(stopped),
            };
        }
        Ok(Stopped::Done)
    }

    /// Starts as many reads as there is room for, then updates the oldest tile and starts its writes; waits for the disk
    /// where that is not there yet.
    pub(crate) fn advance(&mut self) -> Result<()> {
        let stopped = self.start_all_reads()?;
        if stopped == Stopped::NoFrames
            && self.active().jobs.is_empty()
            && let Some((unit, tile)) = self.active().work.front().copied()
            && self.start_reads(unit, tile, Lacking::Stage)? == Stopped::Done
        {
            self.active_mut().work.pop_front();
        }
        if self.update_oldest()? {
            return Ok(());
        }
        // No room for a single tile: writes still hold the ring. Or a tile that is still being read.
        self.step_receive()
    }

    /// Updates the oldest tile and starts its writes, if it has been read; returns whether it had.
    pub(crate) fn update_oldest(&mut self) -> Result<bool> {
        let step = self.active_mut();
        let Some(mut job) = step.jobs.pop_front_if(|job| job.pending == 0) else {
            return Ok(false);
        };
        step.base += 1;
        if let Some(error) = job.failed.take() {
            return Err(error.into());
        }
        let unit = job.unit;
        let without_gradient = step.units[unit].without_gradient;
        let update = Update {
            pool: &self.pool,
            disk: self.disk.as_ref(),
            grad: self.gradients.dtype,
            without_gradient,
            unit,
            tile: job.tile,
        };
        let gradient = job.take(self.units[unit].gradient_number());
        let step = self.step.active.as_ref().expect("looked at just now");
        let plan = &step.units[unit].plan;
        let begun = self.recorder.begin();
        let checksums = update_tile(
            &update,
            &mut self.units[unit],
            &mut job.buffers,
            gradient.as_ref(),
            plan,
        )?;
        let bytes = self.units[unit].tile_bytes(job.tile);
        self.recorder
            .end(begun, Activity::Update, Some(unit), bytes);
        drop(gradient);
        self.step.tiles.add(1);
        self.start_writes(job, &checksums)?;
        let progress = &mut self.active_mut().units[unit];
        progress.tiles -= 1;
        if progress.tiles == 0 {
            self.unit_updated(unit)?;
        }
        Ok(true)
    }

    /// Notes what the disk has done, without waiting.
    pub(crate) fn note_completions(&mut self) -> Result<()> {
        let Some(step) = self.step.active.as_mut() else {
            return Ok(());
        };
        // After an error none is taken: one that is taken and not noted would be waited for without end.
        while let Ok(completion) = step.replies.1.try_recv() {
            step.note(completion)?;
        }
        Ok(())
    }

    /// The last tile of a unit has its new value.
    fn unit_updated(&mut self, unit: usize) -> Result<()> {
        if let StateBlocks::Disk { pristine } = &mut self.units[unit].state {
            *pristine = false;
            if !self.active().units[unit].without_gradient {
                // Used up, and not needed before backward accumulates the next ones: room for the activations in
                // between.
                if self.step.is_speculating() {
                    self.keep_gradients(unit)?;
                } else {
                    self.release_gradients(unit)?;
                }
            }
        } else if !self.active().units[unit].without_gradient {
            self.release_unused(unit)?;
        }
        let used = self.weights.tick();
        let alone = self.units[unit].mesh.has_all();
        if let Some(residence) = self.residence_mut(unit)
            && matches!(residence, Residence::Updating)
        {
            *residence = Residence::Here {
                all_shards_valid: alone,
                pinned: false,
                used,
            };
        }
        // What backward updates, the next forward uses in the other order.
        self.active_mut().units[unit].ahead = self.step.early.is_none();
        self.weights_renewed(unit);
        Ok(())
    }

    /// Takes memory for the tile and starts reading into it, or says what there is none of.
    fn start_reads(&mut self, unit: usize, tile: u32, lacking: Lacking) -> Result<Stopped> {
        if !self.try_window(unit, tile)? && lacking == Lacking::Wait && self.has_ahead() {
            return Ok(Stopped::NoFrames);
        }
        let this = &self.units[unit];
        let mut buffers = Vec::new();
        let mut to_read = Vec::new();
        let pristine = this.state.is_pristine();
        for (index, tensor) in this.tensors.tensors().iter().enumerate() {
            match tensor.role {
                Role::Live if !this.weights.on_disk() || this.weights.in_memory() => continue,
                Role::Exact | Role::Moment if matches!(this.state, StateBlocks::Host { .. }) => {
                    continue;
                }
                _ => {}
            }
            let elements = this.tiles_of(tensor.key).range(tile);
            let lease = match (tensor.role, self.residence(unit)) {
                (Role::Live, Some(Residence::Updating)) => this
                    .weights
                    .window()
                    .expect("weights on disk have a window")
                    .lease(tensor.byte_range(&this.flat(&elements)))?,
                _ => match self.disk().ring.lease(tile_bytes(tensor, &elements), PAGE) {
                    Ok(lease) => lease,
                    Err(_) => return Ok(Stopped::NoRing),
                },
            };
            if pristine && tensor.role == Role::Moment {
                let mut lease = lease;
                fill_initial(tensor, &mut lease);
                buffers.push((index, lease));
            } else {
                to_read.push((index, tensor.key, lease));
            }
        }
        if this.grad.is_spilled() && !self.active().units[unit].without_gradient {
            let bytes = byte_range(&this.state_tiles.range(tile), self.gradients.dtype.size());
            match self.disk().ring.lease(bytes.len(), PAGE) {
                Ok(lease) => to_read.push((this.gradient_number(), GRADIENT, lease)),
                Err(_) => return Ok(Stopped::NoRing),
            }
        }
        let step = self
            .step
            .active
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
        for (index, key, lease) in to_read {
            let tag = number | ((index as u64) << TENSOR_SHIFT);
            let disk = self.disk.as_ref().expect("something is read from it");
            let buffer = TileBuffer {
                id: block(unit, key),
                tile,
                bytes: lease,
            };
            disk.start_read(buffer, tag, &step.replies.0)?;
            step.jobs[at].pending += 1;
        }
        Ok(Stopped::Done)
    }

    /// Before the first tile of a unit that is away: frames for its window, if that takes nothing from units in use.
    /// Its weights are then updated where the next forward wants them. False where there are none.
    fn try_window(&mut self, unit: usize, tile: u32) -> Result<bool> {
        if tile > 0
            || !self.active().units[unit].takes_every_tile
            || !self.units[unit].weights.on_disk()
            || !matches!(self.residence(unit), Some(Residence::Away))
        {
            return Ok(true);
        }
        if !self.map_frames(unit, false, self.under(unit))? {
            return Ok(false);
        }
        if let Some(residence) = self.residence_mut(unit) {
            *residence = Residence::Updating;
        }
        Ok(true)
    }

    /// Whether the step has yet to update the unit's weights on disk, or has done so and nobody has used them since.
    pub(crate) fn is_due(&self, unit: usize) -> bool {
        let step = &self.step;
        self.units[unit].weights.on_disk() && (step.is_updating(unit) || step.is_ahead(unit))
    }

    /// Whether a unit's use is to come that will then give memory under windows back.
    fn has_ahead(&self) -> bool {
        (0..self.units.len()).any(|unit| match self.residence(unit) {
            Some(Residence::Updating) => true,
            Some(Residence::Here { pinned: false, .. }) => self.is_due(unit),
            _ => false,
        })
    }

    fn start_writes(&mut self, job: TileJob, checksums: &[(usize, u64)]) -> Result<()> {
        let this = &self.units[job.unit];
        let mut outgoing = job.buffers;
        if let UnitWeights::Moving {
            window, home: None, ..
        } = &this.weights
            && this.weights.in_memory()
        {
            let flat = this.flat(&this.weight_tiles.range(job.tile));
            let bytes = byte_range(&flat, self.compute.size());
            outgoing.push((0, window.lease(bytes)?));
        }
        let step = self
            .step
            .active
            .as_mut()
            .expect("driven only while there is a step");
        for (tensor, lease) in outgoing {
            let (_, checksum) = checksums
                .iter()
                .find(|(found, _)| *found == tensor)
                .expect("taken of everything that goes to disk");
            let key = this.tensors.tensors()[tensor].key;
            let tag = WRITE | job.unit as u64;
            let disk = self.disk.as_ref().expect("something goes to it");
            let buffer = TileBuffer {
                id: block(job.unit, key),
                tile: job.tile,
                bytes: lease,
            };
            disk.start_write(buffer, Some(*checksum), tag, &step.replies.0)?;
            step.writes += 1;
            step.units[job.unit].writes += 1;
        }
        Ok(())
    }

    /// Takes one completion: a buffer goes back to its tile, or to where it came from after a write.
    pub(crate) fn step_receive(&mut self) -> Result<()> {
        let (Some(step), Some(disk)) = (self.step.active.as_mut(), self.disk.as_ref()) else {
            return Ok(());
        };
        let completion = disk.receive(&step.replies.1)?;
        step.note(completion)
    }

    fn active(&self) -> &ActiveStep {
        self.step
            .active
            .as_ref()
            .expect("driven only while there is a step")
    }

    fn active_mut(&mut self) -> &mut ActiveStep {
        self.step
            .active
            .as_mut()
            .expect("driven only while there is a step")
    }
}

fn tensor_of(tag: u64) -> usize {
    to_usize((tag & !WRITE) >> TENSOR_SHIFT)
}
