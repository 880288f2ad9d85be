//! Durable runs: commits of all state, on disk or in host memory, and the way back to the last one.
//!
//! What is at home on disk is in the store already when a step has ended. What is at home in host memory has blocks there
//! as well, its *mirror*: a commit copies to them whatever is not what they hold. So a commit is whole whatever the homes
//! are, and what each of its halves does is told in the store's `commit.rs`.
//!
//! Numbers of updates are the caller's to note: they are its to set.

pub(crate) mod reads;

use std::sync::mpsc::channel;

use zeroxide_layout::{PAGE, StateKey, TILE_QUANTUM, Tiling};
use zeroxide_memory::Lease;
use zeroxide_storage::{Commit, Completion, checksum};

use crate::core::{Core, to_usize};
use crate::error::{Result, misuse};
use crate::settings::Settings;
use crate::step::Poison;
use crate::tile_io::{TileBuffer, tile_bytes};
use crate::unit::{StateBlocks, Unit};
use crate::weights::gather::block;
use crate::weights::residence::{Residence, UnitWeights};

/// Elements in a tile of a mirror: as many as a tile of what is at home on disk, and few enough that two of them fit into
/// the staging ring.
pub(crate) fn mirror_tile(settings: &Settings) -> u64 {
    const LARGEST: u64 = 4;
    let room = settings.staging_bytes / (2 * LARGEST) / TILE_QUANTUM * TILE_QUANTUM;
    settings.tile_elements.min(room).max(TILE_QUANTUM)
}

/// The state tensors of a unit that are at home in host memory, and this rank's elements of each.
fn mirrored(unit: &Unit) -> Vec<(StateKey, u64)> {
    let weights_here = match &unit.weights {
        UnitWeights::Host { .. } | UnitWeights::Moving { home: Some(_), .. } => true,
        UnitWeights::Moving { home: None, .. }
        | UnitWeights::Borrowed { .. }
        | UnitWeights::Away { .. } => false,
    };
    let state_here = matches!(unit.state, StateBlocks::Host { .. });
    let elements = |key| {
        let (here, elements) = if key == StateKey::WEIGHT {
            (weights_here, unit.weight_tiles.len())
        } else {
            (state_here, unit.state_tiles.len())
        };
        if here { elements } else { 0 }
    };
    let keys = unit.tensors.tensors().iter().map(|tensor| tensor.key);
    keys.map(|key| (key, elements(key)))
        .filter(|(_, elements)| *elements > 0)
        .collect()
}

impl Core {
    /// Goes on from a commit that an earlier run has left, or from none for 0.
    pub(crate) fn adopt(&mut self, generation: u64) -> Result<Option<Commit>> {
        self.check_durable("adopt")?;
        Ok(self.disk().store.adopt(generation)?)
    }

    /// Ends the step under way, copies what is in host memory to disk, and prepares the store's commit with `note`.
    pub(crate) fn prepare_commit(&mut self, note: &str) -> Result<u64> {
        self.check_durable("prepare_commit")?;
        self.check_usable()?;
        self.check_between_steps("prepare_commit")?;
        if self.state.fill.is_some() {
            return misuse("prepare_commit", "a fill has not been committed");
        }
        self.state.cache.clear();
        self.finish_step()?;
        self.wait_reads()?;
        for unit in 0..self.units.len() {
            for (key, elements) in mirrored(&self.units[unit]) {
                self.mirror(unit, key, elements)?;
            }
        }
        self.disk().ring.discard_if_free()?;
        Ok(self.disk().store.prepare_commit(note)?)
    }

    /// The commit that was prepared is the last one.
    pub(crate) fn conclude_commit(&mut self) -> Result<()> {
        self.check_durable("conclude_commit")?;
        Ok(self.disk().store.conclude_commit()?)
    }

    /// Makes all state what the last commit says. Gradients are forgotten; numbers of updates stay.
    pub(crate) fn roll_back(&mut self) -> Result<()> {
        self.check_durable("roll_back")?;
        self.check_usable()?;
        self.check_between_steps("roll_back")?;
        if self.state.fill.is_some() {
            return misuse("roll_back", "a fill has not been committed");
        }
        self.state.cache.clear();
        self.finish_step()?;
        self.wait_reads()?;
        self.clear_gradients();
        self.disk().store.roll_back()?;
        let outcome = (0..self.units.len()).try_for_each(|unit| self.roll_back_unit(unit));
        if let Err(error) = &outcome {
            // Some of it is of the commit, some is not.
            let step = self.step.count;
            self.step
                .poisoned
                .get_or_insert_with(|| Poison::new(step, &error, false));
        }
        outcome
    }

    fn roll_back_unit(&mut self, unit: usize) -> Result<()> {
        // What lies under the window is not what was committed; at home it is.
        if !matches!(self.residence(unit), None | Some(Residence::Away)) {
            self.evict(unit)?;
        }
        for (key, elements) in mirrored(&self.units[unit]) {
            self.restore(unit, key, elements)?;
        }
        let valid = self.units[unit].mesh.has_all() || self.mesh.shares_weights();
        if let UnitWeights::Host {
            all_shards_valid, ..
        } = &mut self.units[unit].weights
        {
            *all_shards_valid = valid;
        }
        let moment = self.units[unit].tensors.moments().next().map(|it| it.key);
        if let (Some(moment), StateBlocks::Disk { .. }) = (moment, &self.units[unit].state) {
            let never = self.disk().store.newest_checksum(block(unit, moment), 0)?;
            self.units[unit].state = StateBlocks::Disk {
                pristine: never.is_none(),
            };
        }
        Ok(())
    }

    /// Copies a state tensor to its mirror, tile by tile, but for tiles that are there already.
    fn mirror(&mut self, unit: usize, key: StateKey, elements: u64) -> Result<()> {
        let tiles = Tiling::new(elements, self.mirror_tile)?;
        let tensor = *self.units[unit].tensor(key);
        let base = self.units[unit].base;
        let (sender, receiver) = channel();
        let mut in_flight = 0_u32;
        let mut outcome = Ok(());
        for tile in 0..tiles.count() {
            let range = tiles.range(tile);
            let bytes = tile_bytes(&tensor, &range);
            let mut lease = loop {
                match self.disk().ring.lease(bytes, PAGE) {
                    Ok(lease) => break Ok(lease),
                    Err(error) if in_flight == 0 => break Err(error),
                    // Room comes back with a write that has ended.
                    Err(_) => {
                        in_flight -= 1;
                        let written = self.disk().receive(&receiver)?;
                        outcome = outcome.and(self.written(written));
                    }
                }
            }?;
            if outcome.is_err() {
                break;
            }
            // What is left of the last page has a checksum, too.
            lease[tensor.byte_range(&(0..range.end - range.start)).end..].fill(0);
            let flat = base + range.start..base + range.end;
            self.read_elements(unit, key, flat, |offset, from| {
                let at = to_usize(tensor.bytes(offset as u64));
                lease[at..at + from.len()].copy_from_slice(from);
            })?;
            let id = block(unit, key);
            let crc = checksum(&lease);
            if self.disk().store.newest_checksum(id, tile)? == Some(crc) {
                continue;
            }
            let buffer = TileBuffer {
                id,
                tile,
                bytes: lease,
            };
            self.disk().start_write(buffer, Some(crc), 0, &sender)?;
            in_flight += 1;
        }
        while in_flight > 0 {
            in_flight -= 1;
            let written = self.disk().receive(&receiver)?;
            outcome = outcome.and(self.written(written));
        }
        outcome
    }

    /// What came of a write to a mirror. After one that failed no commit may say that the tile is there.
    fn written(&self, completion: Completion) -> Result<()> {
        let outcome = completion.result;
        if outcome.is_err() {
            self.disk().store.lose();
        }
        Ok(outcome?)
    }

    /// Copies a state tensor from its mirror to where it is at home.
    fn restore(&mut self, unit: usize, key: StateKey, elements: u64) -> Result<()> {
        let tiles = Tiling::new(elements, self.mirror_tile)?;
        let tensor = *self.units[unit].tensor(key);
        for tile in 0..tiles.count() {
            let range = tiles.range(tile);
            let bytes = tile_bytes(&tensor, &range);
            let found = self.disk().read_tile(block(unit, key), tile, bytes)?;
            self.home_of(unit, key, &range, |target| {
                target.copy_from_slice(&found[..target.len()]);
            })?;
        }
        Ok(())
    }

    /// Calls `write` with the host memory that elements `range` of this rank's part of a state tensor are at home in.
    fn home_of(
        &mut self,
        unit: usize,
        key: StateKey,
        range: &std::ops::Range<u64>,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let this = &mut self.units[unit];
        let tensor = *this.tensor(key);
        let flat = this.flat(range);
        let bytes = tensor.byte_range(range);
        match (&mut this.weights, &mut this.state) {
            (UnitWeights::Host { window, .. }, _) if key == StateKey::WEIGHT => {
                write(&mut window.lease(tensor.byte_range(&flat))?);
            }
            (
                UnitWeights::Moving {
                    home: Some(home), ..
                },
                _,
            ) if key == StateKey::WEIGHT => write(&mut home[bytes]),
            (_, StateBlocks::Host { blocks }) => {
                let found = blocks.iter_mut().find(|(found, _)| *found == key);
                let lease: &mut Lease = &mut found.expect("the unit has this tensor").1;
                write(&mut lease[bytes]);
            }
            _ => return misuse("roll_back", format!("{key} of {} is not here", this.name)),
        }
        Ok(())
    }

    pub(crate) fn check_durable(&self, call: &'static str) -> Result<()> {
        match &self.disk {
            Some(disk) if disk.store.is_durable() => Ok(()),
            _ => misuse(call, "the run is not durable"),
        }
    }
}
