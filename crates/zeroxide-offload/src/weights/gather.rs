//! Bringing a unit's weights under its window, and letting them go again.
//!
//! A released unit keeps its frames until another unit needs them. Training scans the units forth and back, so the
//! unit used longest ago is the one needed last: reclaiming the oldest keeps exactly those that come next.

use zeroxide_layout::{BlockId, StateKey};
use zeroxide_memory::{FRAME, Frame};
use zeroxide_storage::Completion;

use crate::core::{Core, byte_range, to_usize};
use crate::error::{OffloadError, Result, misuse};
use crate::tile_io::weight_buffers;
use crate::weights::cover::Under;
use crate::weights::residence::{Residence, UnitWeights};

const TILE_BITS: u32 = 32;

impl Core {
    /// Makes this rank's part of the unit's weights readable under its window and holds it there. Idempotent.
    ///
    /// Returns whether the other ranks' parts are there, too. Where they are not, the caller brings them, and says so
    /// with
    /// [`set_all_shards_valid`](Self::set_all_shards_valid). With `covered` nothing is readable before that. What
    /// [`before_gathering`](Self::before_gathering) tells of has happened.
    pub(crate) fn gather(&mut self, unit: usize, covered: bool) -> Result<bool> {
        self.check_usable()?;
        self.check_here("gather", unit)?;
        self.check_not_begun("gather", unit)?;
        self.catch_up(unit)?;
        self.finish_unit(unit)?;
        self.poll_arrivals();
        if matches!(self.residence(unit), Some(Residence::Away)) {
            self.finish_writes(unit)?;
        }
        if matches!(self.residence(unit), Some(Residence::Away)) && !self.fetch(unit, true)? {
            return Err(self.no_frames(unit));
        }
        if matches!(self.residence(unit), Some(Residence::Arriving { .. })) {
            self.await_arrival(unit)?;
        }
        let clock = self.weights.tick();
        if let Some(Residence::Here { pinned, used, .. }) = self.residence_mut(unit) {
            *pinned = true;
            *used = clock;
        }
        self.step.note_use(unit);
        self.prepare_for_parts(unit, covered)?;
        self.refresh_shard(unit)?;
        Ok(match &self.units[unit].weights {
            UnitWeights::Host {
                all_shards_valid, ..
            } => *all_shards_valid,
            UnitWeights::Moving { residence, .. } => {
                matches!(
                    residence,
                    Residence::Here {
                        all_shards_valid: true,
                        ..
                    }
                )
            }
            UnitWeights::Borrowed { .. } | UnitWeights::Away { .. } => true,
        })
    }

    /// As [`gather`](Self::gather), ahead of the unit's use; `None` where units that are held leave it no room.
    ///
    /// With several ranks the answer depends only on which units are held, never on what the disk has done, so that all
    /// ranks get the same one.
    pub(crate) fn gather_ahead(&mut self, unit: usize, covered: bool) -> Result<Option<bool>> {
        self.check_usable()?;
        Ok(if self.has_room(unit)? {
            Some(self.gather(unit, covered)?)
        } else {
            None
        })
    }

    /// Whether the unit's weights would fit under its window beside those of all units that are held.
    pub(crate) fn has_room(&self, unit: usize) -> Result<bool> {
        self.check_unit("has_room", unit)?;
        let Some(pool) = &self.weights.frames else {
            return Ok(true);
        };
        let held = |other: &usize| {
            *other == unit
                || matches!(
                    self.residence(*other),
                    Some(Residence::Here { pinned: true, .. })
                )
        };
        let frames: usize = (0..self.units.len())
            .filter(held)
            .filter_map(|other| match &self.units[other].weights {
                UnitWeights::Moving { window, .. } => Some(window.frames()),
                _ => None,
            })
            .sum();
        Ok(frames <= pool.capacity())
    }

    /// The other ranks' parts of the unit's weights are there: all of it can be read.
    pub(crate) fn set_all_shards_valid(&mut self, unit: usize) -> Result<()> {
        self.check_unit("set_all_shards_valid", unit)?;
        self.publish(unit)?;
        match &mut self.units[unit].weights {
            UnitWeights::Host {
                all_shards_valid, ..
            }
            | UnitWeights::Moving {
                residence:
                    Residence::Here {
                        all_shards_valid, ..
                    },
                ..
            } => *all_shards_valid = true,
            UnitWeights::Moving { .. } => {
                return misuse("set_all_shards_valid", "the unit is not gathered");
            }
            UnitWeights::Borrowed { .. } | UnitWeights::Away { .. } => {}
        }
        Ok(())
    }

    /// Where the shard is at home beside the window: brings its present value under the window.
    fn refresh_shard(&mut self, unit: usize) -> Result<()> {
        let element = self.compute.size();
        let this = &self.units[unit];
        let own = this.own();
        if let UnitWeights::Moving {
            window,
            residence:
                Residence::Here {
                    all_shards_valid: false,
                    ..
                },
            home: Some(home),
            ..
        } = &this.weights
        {
            window
                .lease(byte_range(&own, element))?
                .copy_from_slice(home);
        }
        Ok(())
    }

    /// Bytes of a unit's live weights, all ranks' parts; 0 where there is no such unit.
    pub(crate) fn weight_bytes(&self, unit: usize) -> u64 {
        let elements = self.units.get(unit).map_or(0, |unit| unit.layout.len());
        elements * self.compute.size() as u64
    }

    /// Starts reading the unit if there is room for it; returns whether it is here or on its way.
    pub(crate) fn prefetch(&mut self, unit: usize) -> Result<bool> {
        self.check_usable()?;
        self.check_unit("prefetch", unit)?;
        self.catch_up(unit)?;
        if self.is_stepping(unit) {
            // The step brings it under its window itself.
            return Ok(true);
        }
        if !self.units[unit].weights.on_disk() {
            // There is nothing to read, and taking frames early would only cost another unit its own.
            return Ok(true);
        }
        self.poll_arrivals();
        match self.residence(unit) {
            Some(Residence::Away) => self.fetch(unit, false),
            _ => Ok(true),
        }
    }

    /// Lets the unit's frames be taken by another unit. Idempotent.
    pub(crate) fn release(&mut self, unit: usize) -> Result<()> {
        self.check_unit("release", unit)?;
        let clock = self.weights.tick();
        // How long frames stay depends on when disk requests end, which differs between ranks. Whether a unit's other
        // parts have to be brought again must not, or collectives would not meet.
        let forget = !self.units[unit].mesh.has_all() && self.units[unit].weights.on_disk();
        // Only the end of a use is a use: releasing once more does not make the unit a late one.
        if let Some(Residence::Here {
            pinned,
            used,
            all_shards_valid,
        }) = self.residence_mut(unit)
            && *pinned
        {
            *pinned = false;
            *used = clock;
            *all_shards_valid &= !forget;
        }
        Ok(())
    }

    /// Waits for every read under way into a window.
    pub(crate) fn wait_reads(&mut self) -> Result<()> {
        for unit in 0..self.units.len() {
            if matches!(self.residence(unit), Some(Residence::Arriving { .. })) {
                self.await_arrival(unit)?;
            }
        }
        Ok(())
    }

    pub(crate) fn residence(&self, unit: usize) -> Option<&Residence> {
        match &self.units[unit].weights {
            UnitWeights::Moving { residence, .. } => Some(residence),
            _ => None,
        }
    }

    pub(crate) fn residence_mut(&mut self, unit: usize) -> Option<&mut Residence> {
        match &mut self.units[unit].weights {
            UnitWeights::Moving { residence, .. } => Some(residence),
            _ => None,
        }
    }

    /// Puts frames under the window of a unit that is away. `forced` also empties units that were only prefetched.
    pub(crate) fn map_frames(&mut self, unit: usize, forced: bool, under: Under) -> Result<bool> {
        let bytes = to_usize(self.units[unit].layout.len()) * self.compute.size();
        let Some(frames) = self.take_frames(bytes.div_ceil(FRAME), unit, forced)? else {
            return Ok(false);
        };
        let UnitWeights::Moving { window, .. } = &mut self.units[unit].weights else {
            return Ok(true);
        };
        match under {
            Under::Window => window.map(frames)?,
            Under::Nothing => window.load(frames)?,
        }
        Ok(true)
    }

    fn fetch(&mut self, unit: usize, forced: bool) -> Result<bool> {
        // A reader that nothing announced must not see half of what is read.
        if !self.map_frames(unit, forced, Under::Nothing)? {
            return Ok(false);
        }
        let mut pending = 0;
        let mut failed = None;
        let this = &self.units[unit];
        if !this.weights.on_disk() {
            self.weights.clock += 1;
            let used = self.weights.clock;
            if let Some(residence) = self.residence_mut(unit) {
                *residence = Residence::Here {
                    all_shards_valid: false,
                    pinned: false,
                    used,
                };
            }
            return Ok(true);
        }
        let disk = self.disk();
        for buffer in weight_buffers(this, weight_block(unit)) {
            let buffer = buffer?;
            let tag = ((unit as u64) << TILE_BITS) | u64::from(buffer.tile);
            match disk.start_read(buffer, tag, &disk.arrivals.0) {
                Ok(()) => pending += 1,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if let Some(residence) = self.residence_mut(unit) {
            *residence = Residence::Arriving { pending, failed };
        }
        Ok(true)
    }

    fn take_frames(
        &mut self,
        count: usize,
        wanted_by: usize,
        forced: bool,
    ) -> Result<Option<Vec<Frame>>> {
        loop {
            let pool = self
                .weights
                .frames
                .as_ref()
                .expect("a unit whose weights move implies frames");
            if let Some(frames) = pool.take(count) {
                return Ok(Some(frames));
            }
            if let Some(oldest) = self.oldest_released(wanted_by) {
                self.evict(oldest)?;
            } else if let Some(arriving) = forced.then(|| self.any_arriving(wanted_by)).flatten() {
                self.await_arrival(arriving)?;
            } else if let Some(ahead) = forced.then(|| self.any_updating(wanted_by)).flatten() {
                // The step has taken these frames for a unit that comes later than one it has no work for.
                self.finish_writes(ahead)?;
            } else if let Some(ahead) = forced.then(|| self.any_ahead(wanted_by)).flatten() {
                // Updated for a use that comes later than this one after all: it is read again for that.
                self.evict(ahead)?;
            } else if let Some(held) = forced.then(|| self.oldest_held(wanted_by)).flatten() {
                // Whoever still reads it brings it back, one read at a time.
                self.evict(held)?;
            } else {
                return Ok(None);
            }
        }
    }

    /// The unit in use that was gathered first, where reads bring a unit back on their own.
    fn oldest_held(&self, except: usize) -> Option<usize> {
        if !self.mesh.has_all() {
            return None;
        }
        (0..self.units.len())
            .filter(|unit| *unit != except)
            .filter_map(|unit| match self.residence(unit) {
                Some(Residence::Here {
                    pinned: true, used, ..
                }) => Some((*used, unit)),
                _ => None,
            })
            .min()
            .map(|(_, unit)| unit)
    }

    fn oldest_released(&self, except: usize) -> Option<usize> {
        (0..self.units.len())
            .filter(|unit| *unit != except)
            .filter_map(|unit| match self.residence(unit) {
                Some(Residence::Here {
                    pinned: false,
                    used,
                    ..
                }) if !self.is_due(unit) => Some((*used, unit)),
                _ => None,
            })
            .min()
            .map(|(_, unit)| unit)
    }

    fn any_updating(&self, except: usize) -> Option<usize> {
        (0..self.units.len()).find(|unit| {
            let mapped = matches!(
                self.residence(*unit),
                Some(Residence::Updating | Residence::Here { pinned: false, .. })
            );
            *unit != except && mapped && self.step.is_updating(*unit)
        })
    }

    fn any_ahead(&self, except: usize) -> Option<usize> {
        (0..self.units.len()).find(|unit| {
            let here = matches!(
                self.residence(*unit),
                Some(Residence::Here { pinned: false, .. })
            );
            *unit != except && here && self.step.is_ahead(*unit)
        })
    }

    fn any_arriving(&self, except: usize) -> Option<usize> {
        (0..self.units.len()).find(|unit| {
            *unit != except && matches!(self.residence(*unit), Some(Residence::Arriving { .. }))
        })
    }

    /// Takes the frames away from a unit that nobody uses; its bytes are at home.
    pub(crate) fn evict(&mut self, unit: usize) -> Result<()> {
        // Elsewhere a step updates the shard at home, and what is under the window is a copy.
        if self.units[unit].weights.on_disk() {
            self.finish_writes(unit)?;
        }
        if let UnitWeights::Moving {
            window, residence, ..
        } = &mut self.units[unit].weights
        {
            drop(window.unmap()?);
            *residence = Residence::Away;
        }
        Ok(())
    }

    fn poll_arrivals(&mut self) {
        while let Some(completion) = self
            .disk
            .as_ref()
            .and_then(|disk| disk.arrivals.1.try_recv().ok())
        {
            self.note_arrival(completion);
        }
    }

    fn note_arrival(&mut self, completion: Completion) {
        let unit = to_usize(completion.tag >> TILE_BITS);
        if let Some(Residence::Arriving { pending, failed }) = self.residence_mut(unit) {
            *pending -= 1;
            if let Err(error) = completion.result {
                failed.get_or_insert(error);
            }
        }
    }

    /// Waits until the unit's reads are done and verified; afterwards it is here and not pinned.
    pub(crate) fn await_arrival(&mut self, unit: usize) -> Result<()> {
        while matches!(self.residence(unit), Some(Residence::Arriving { pending, .. }) if *pending > 0)
        {
            let disk = self.disk();
            let completion = disk.receive(&disk.arrivals.1)?;
            self.note_arrival(completion);
        }
        let failed = match self.residence_mut(unit) {
            Some(Residence::Arriving { failed, .. }) => failed.take(),
            _ => None,
        };
        let outcome = match failed {
            Some(error) => Err(error.into()),
            None => self.verify_window(unit),
        };
        let outcome = match outcome {
            Ok(()) if self.units[unit].mesh.has_all() => self.publish(unit),
            other => other,
        };
        let used = self.weights.tick();
        let all_shards_valid = self.units[unit].mesh.has_all();
        if let Some(residence) = self.residence_mut(unit) {
            *residence = Residence::Here {
                all_shards_valid,
                pinned: false,
                used,
            };
        }
        if outcome.is_err() {
            self.evict(unit)?;
        }
        outcome
    }

    fn verify_window(&self, unit: usize) -> Result<()> {
        let id = weight_block(unit);
        let tiles = weight_buffers(&self.units[unit], id);
        let tiles = tiles.collect::<Result<Vec<_>>>()?;
        self.disk().verify_tiles(&self.pool, tiles)
    }

    fn no_frames(&self, unit: usize) -> OffloadError {
        let pool = self
            .weights
            .frames
            .as_ref()
            .expect("a unit whose weights move implies frames");
        OffloadError::NoFrames {
            unit: self.units[unit].name.clone(),
            need: self.weight_bytes(unit),
            held: ((pool.capacity() - pool.free()) * FRAME) as u64,
            capacity: (pool.capacity() * FRAME) as u64,
        }
    }
}

pub(crate) fn weight_block(unit: usize) -> BlockId {
    block(unit, StateKey::WEIGHT)
}

pub(crate) fn block(unit: usize, key: StateKey) -> BlockId {
    BlockId {
        unit: u32::try_from(unit).expect("counted at creation"),
        key,
    }
}
