//! Whole values in: initial weights and checkpoints. Always as fp32, whatever the format keeps.

use std::ops::Range;

use zeroxide_layout::{Role, STATE_BLOCK, StateDtype, StateKey, StateLayout, StateTensor};
use zeroxide_memory::{Arena, Bucket, Lease};
use zeroxide_optim::{encode_exact, encode_live, encode_moment};

use crate::core::{Core, byte_range, to_usize};
use crate::error::{Result, misuse};
use crate::homes::fill_initial;
use crate::tile_io::{TileBuffer, tile_bytes, tiles_with, weight_buffers};
use crate::unit::{StateBlocks, Unit};
use crate::weights::gather::block;
use crate::weights::residence::{Residence, UnitWeights};

/// A unit being filled: nothing of it reaches the disk before the commit.
pub(crate) struct Fill {
    unit: usize,
    /// The state tensor whose values come; the weight stands for all that makes it exact.
    key: StateKey,
    /// The tiles of a block at home on disk that are collected in memory.
    collected: Vec<(StateKey, Vec<Lease>)>,
    /// Keeps the memory of `collected` counted in the budget.
    _arena: Option<Arena>,
}

impl Core {
    /// The elements under the unit's window that a fill of its weights writes: this rank's, or all where every rank has
    /// its own copy of them.
    pub(crate) fn filled_window(&self, unit: usize) -> Range<u64> {
        let this = &self.units[unit];
        match &this.weights {
            UnitWeights::Borrowed { .. }
            | UnitWeights::Away { .. }
            | UnitWeights::Moving { home: Some(_), .. } => 0..0,
            UnitWeights::Host { .. } if !self.shares_weights() => 0..this.layout.len(),
            _ => this.own(),
        }
    }

    /// Starts to fill the state tensor `name` of a unit: the weight with all its bits, or one of the rule's own.
    /// Everything not filled before the commit is zero.
    pub(crate) fn fill_begin(&mut self, unit: usize, name: &str) -> Result<()> {
        self.check_usable()?;
        self.check_between_steps("fill_begin")?;
        self.check_here("fill_begin", unit)?;
        let key = self.units[unit].state_key("fill_begin", name)?;
        if self.state.fill.is_some() {
            return misuse("fill_begin", "another fill has not been committed");
        }
        self.state.cache.clear();
        self.catch_up(unit)?;
        self.finish_step()?;
        self.wait_reads()?;
        let alone = self.units[unit].mesh.has_all();
        if key == StateKey::WEIGHT {
            let own = self.units[unit].own();
            if let UnitWeights::Moving {
                home: Some(home),
                residence,
                ..
            } = &mut self.units[unit].weights
            {
                home.fill(0);
                if let Residence::Here {
                    all_shards_valid, ..
                } = residence
                {
                    *all_shards_valid = false;
                }
            } else if matches!(self.residence(unit), Some(Residence::Away))
                && !self.map_frames(unit, true, self.under(unit))?
            {
                return misuse(
                    "fill_begin",
                    format!("no frames for unit {}", self.units[unit].name),
                );
            }
            let filled = self.filled_window(unit);
            let this = &mut self.units[unit];
            if this.weights.on_disk()
                && let UnitWeights::Moving { residence, .. } = &mut this.weights
            {
                *residence = Residence::Here {
                    all_shards_valid: alone,
                    pinned: true,
                    used: 0,
                };
            }
            if let (Some(window), false) = (this.weights.window(), filled.is_empty()) {
                window
                    .lease(byte_range(&filled, self.compute.size()))?
                    .fill(0);
            }
            debug_assert!(
                filled.is_empty() || (filled.start <= own.start && own.end <= filled.end)
            );
        }
        let trainable = to_usize(self.units[unit].state_tiles.len());
        let mut collected = Vec::new();
        let mut arena = None;
        if matches!(self.units[unit].state, StateBlocks::Disk { .. }) {
            let stored = stored_beside(&self.units[unit].tensors, key);
            if let Some(stored) = stored.filter(|_| trainable > 0) {
                let (memory, tiles) = self.collecting(unit, stored)?;
                collected.push((stored, tiles));
                arena = Some(memory);
            }
        }
        self.state.fill = Some(Fill {
            unit,
            key,
            collected,
            _arena: arena,
        });
        Ok(())
    }

    /// Memory for all tiles of a block of a unit's state, with zeros in it.
    fn collecting(&self, unit: usize, stored: StateKey) -> Result<(Arena, Vec<Lease>)> {
        let this = &self.units[unit];
        let (tensor, tiles) = (this.tensor(stored), this.state_tiles);
        let sizes = || (0..tiles.count()).map(|tile| tile_bytes(tensor, &tiles.range(tile)));
        let memory = Arena::new(&self.budget, Bucket::Staging, sizes().sum())?;
        let leases = sizes().map(|bytes| {
            let mut lease = memory.lease(bytes, zeroxide_layout::PAGE)?;
            lease.fill(0);
            Ok(lease)
        });
        let leases = leases.collect::<Result<_>>()?;
        Ok((memory, leases))
    }

    /// Gives elements `start..` of one parameter of the unit being filled.
    pub(crate) fn fill_param(
        &mut self,
        unit: usize,
        param: usize,
        start: u64,
        values: &[f32],
    ) -> Result<()> {
        self.check_param("fill_param", unit, param)?;
        let Some(mut fill) = self.state.fill.take() else {
            return misuse("fill_param", "no fill has begun");
        };
        let outcome = self.fill_into(&mut fill, unit, param, start, values);
        self.state.fill = Some(fill);
        outcome
    }

    fn fill_into(
        &mut self,
        fill: &mut Fill,
        unit: usize,
        param: usize,
        start: u64,
        values: &[f32],
    ) -> Result<()> {
        let window_range = self.filled_window(unit);
        let element = self.compute.size();
        let this = &mut self.units[unit];
        let numel = this.layout.numel(param);
        let end = start + values.len() as u64;
        if fill.unit != unit || end > numel {
            return misuse(
                "fill_param",
                format!(
                    "elements {start}..{end} of {numel} in unit {}; filling unit {}",
                    this.name, fill.unit
                ),
            );
        }
        if let Some(stored) = stored_beside(&this.tensors, fill.key) {
            whole_blocks("fill_param", this.tensor(stored), start..end, numel)?;
        }
        let at = this.layout.offset(param) + start;
        let range = at..at + values.len() as u64;
        let (own, kept) = (this.own(), this.kept());
        let part_of = |other: &Range<u64>| {
            let both = range.start.max(other.start)..range.end.min(other.end);
            (both.start < both.end).then(|| {
                let from = to_usize(both.start - range.start);
                let count = to_usize(both.end - both.start);
                (both, &values[from..from + count])
            })
        };
        if fill.key == StateKey::WEIGHT {
            if let (Some(window), Some((both, values))) =
                (this.weights.window(), part_of(&window_range))
            {
                let mut lease = window.lease(byte_range(&both, element))?;
                encode_live(&this.tensors, values, &mut lease);
            }
            if let (
                UnitWeights::Moving {
                    home: Some(home), ..
                },
                Some((both, values)),
            ) = (&mut this.weights, part_of(&own))
            {
                let local = both.start - own.start..both.end - own.start;
                encode_live(
                    &this.tensors,
                    values,
                    &mut home[byte_range(&local, element)],
                );
            }
        }
        let Some((both, values)) = part_of(&kept).filter(|_| this.params[param].trainable) else {
            return Ok(());
        };
        let local = both.start - kept.start..both.end - kept.start;
        let Some(stored) = stored_beside(&this.tensors, fill.key) else {
            return Ok(());
        };
        this.store_filled(fill, stored, local, values);
        Ok(())
    }

    /// The unit and the state tensor that are being filled.
    pub(crate) fn filling(&self) -> Option<(usize, StateKey)> {
        self.state.fill.as_ref().map(|fill| (fill.unit, fill.key))
    }

    /// Writes what was filled to where it is at home. The unit's weights stay in memory until others need the room.
    pub(crate) fn fill_commit(&mut self, unit: usize) -> Result<()> {
        let Some(fill) = self.state.fill.take() else {
            return misuse("fill_commit", "no fill has begun");
        };
        if fill.unit != unit {
            return misuse(
                "fill_commit",
                format!("unit {unit}, but unit {} is being filled", fill.unit),
            );
        }
        if self.units[unit].state.is_pristine() && fill.key != StateKey::WEIGHT {
            self.write_initial_moments(unit, Some(fill.key))?;
        }
        let outcome = match &self.disk {
            None => Ok(()),
            Some(disk) => {
                let this = &self.units[unit];
                let live = fill.key == StateKey::WEIGHT && this.weights.on_disk();
                let weights = live.then(|| weight_buffers(this, block(unit, StateKey::WEIGHT)));
                let state = fill.collected.into_iter().flat_map(|(key, tiles)| {
                    let id = block(unit, key);
                    let buffer = move |(tile, bytes)| Ok(TileBuffer { id, tile, bytes });
                    (0..).zip(tiles).map(buffer)
                });
                disk.write_tiles(weights.into_iter().flatten().chain(state))
            }
        };
        self.release(unit)?;
        if let (
            StateKey::WEIGHT,
            UnitWeights::Host {
                all_shards_valid, ..
            },
        ) = (fill.key, &mut self.units[unit].weights)
        {
            // Filled by every rank.
            *all_shards_valid = true;
        }
        outcome
    }

    /// All moments of a unit must exist on disk once one of them does: writes those that nobody has, `filled` left out.
    pub(crate) fn write_initial_moments(
        &mut self,
        unit: usize,
        filled: Option<StateKey>,
    ) -> Result<()> {
        if let StateBlocks::Disk { pristine } = &mut self.units[unit].state {
            *pristine = false;
        }
        let this = &self.units[unit];
        let tiles = this.state_tiles;
        for tensor in this
            .tensors
            .moments()
            .filter(|each| Some(each.key) != filled)
        {
            let id = block(unit, tensor.key);
            self.disk().write_block(id, tiles, tensor, |bytes| {
                fill_initial(tensor, bytes);
            })?;
        }
        Ok(())
    }
}

impl Unit {
    /// Stores values of elements `local` of this rank's state where they are at home, or are collected for it.
    fn store_filled(
        &mut self,
        fill: &mut Fill,
        stored: StateKey,
        local: Range<u64>,
        values: &[f32],
    ) {
        let tensor = *self.tensor(stored);
        if let StateBlocks::Host { blocks } = &mut self.state {
            if let Some((_, lease)) = blocks.iter_mut().find(|(key, _)| *key == stored) {
                let bytes = &mut lease[tensor.byte_range(&local)];
                store_state(&self.tensors, &tensor, values, bytes);
            }
            return;
        }
        if let Some((_, tiles)) = fill.collected.iter_mut().find(|(key, _)| *key == stored) {
            for (tile, inside, first) in tiles_with(self.state_tiles, local) {
                let values = &values[first..first + to_usize(inside.end - inside.start)];
                let bytes = &mut tiles[tile as usize][tensor.byte_range(&inside)];
                store_state(&self.tensors, &tensor, values, bytes);
            }
        }
    }
}

/// The state tensor that values of `key` go to beside the live weight: what makes a weight exact, or the moment itself.
pub(crate) fn stored_beside(tensors: &StateLayout, key: StateKey) -> Option<StateKey> {
    if key == StateKey::WEIGHT {
        tensors.exact().map(|tensor| tensor.key)
    } else {
        Some(key)
    }
}

/// Stores values in elements of a state tensor other than the live weight.
pub(crate) fn store_state(
    tensors: &StateLayout,
    tensor: &StateTensor,
    values: &[f32],
    bytes: &mut [u8],
) {
    match tensor.role {
        Role::Exact => encode_exact(tensors, values, bytes),
        Role::Live | Role::Moment => encode_moment(tensor, values, bytes),
    }
}

/// Refuses elements `range` of a parameter that begin or end within a block of values that share a scale: the others of the
/// block would have to be rounded again.
pub(crate) fn whole_blocks(
    call: &'static str,
    tensor: &StateTensor,
    range: Range<u64>,
    numel: u64,
) -> Result<()> {
    let block = STATE_BLOCK as u64;
    let ends = range.end == numel || range.end.is_multiple_of(block);
    if !matches!(tensor.dtype, StateDtype::Blocks { .. })
        || range.start == range.end
        || (range.start.is_multiple_of(block) && ends)
    {
        return Ok(());
    }
    misuse(
        call,
        format!(
            "elements {}..{} of {numel} of {}, which is kept in blocks of {block} elements: give whole blocks",
            range.start, range.end, tensor.key
        ),
    )
}
