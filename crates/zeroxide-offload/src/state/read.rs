//! Whole values out: checkpoints and inspection. Always as fp32, whatever the format keeps.

use std::ops::Range;
use std::sync::mpsc::channel;

use zeroxide_layout::StateKey;
use zeroxide_memory::Lease;
use zeroxide_optim::{carry_exact, exact_suffices, join_live, widen};

use crate::core::{Core, byte_range, receive, to_usize};
use crate::error::{Result, misuse};
use crate::unit::StateBlocks;
use crate::weights::gather::block;
use crate::weights::residence::Weights;

/// A tile read for inspection; small reads beside one another hit it.
pub(crate) struct CachedTile {
    unit: usize,
    key: StateKey,
    tile: u32,
    bytes: Lease,
}

const CACHED_TILES: usize = 2;

impl Core {
    /// Reads elements `start..` of one parameter as fp32.
    pub(crate) fn read_param(
        &mut self,
        unit: usize,
        param: usize,
        name: &str,
        start: u64,
        out: &mut [f32],
    ) -> Result<()> {
        self.check_usable()?;
        self.check_param("read_param", unit, param)?;
        let key = self.units[unit].state_key("read_param", name)?;
        if out.is_empty() {
            return Ok(());
        }
        self.finish_step()?;
        self.wait_reads()?;
        let this = &self.units[unit];
        let numel = this.layout.numel(param);
        let end = start + out.len() as u64;
        let at = this.layout.offset(param) + start;
        let range = at..at + out.len() as u64;
        let own = this.own();
        if end > numel || range.start < own.start || range.end > own.end {
            return misuse(
                "read_param",
                format!(
                    "elements {start}..{end} of {numel} in unit {}; this rank has {own:?} of the unit's, which are \
                     {range:?}",
                    this.name
                ),
            );
        }
        let trainable = this.params[param].trainable;
        if key != StateKey::WEIGHT {
            let initial = this.tensors.find(key.name()).map(|tensor| tensor.initial);
            if this.state.is_pristine() || !trainable {
                out.fill(if trainable {
                    initial.unwrap_or(0.0)
                } else {
                    0.0
                });
                return Ok(());
            }
            return self.read_elements(unit, key, range, |offset, bytes| {
                let values: &[f32] = bytemuck::cast_slice(bytes);
                out[offset..offset + values.len()].copy_from_slice(values);
            });
        }
        let exact = this
            .tensors
            .exact()
            .filter(|_| trainable)
            .map(|tensor| tensor.key);
        let Some(exact) = exact else {
            let compute = self.compute;
            return self.read_elements(unit, key, range, |offset, bytes| {
                let count = bytes.len() / compute.size();
                widen(compute, bytes, &mut out[offset..offset + count]);
            });
        };
        let tensors = this.tensors.clone();
        let live = !exact_suffices(&tensors) || self.may_be_edited(unit);
        let size = self.units[unit].element_bytes(exact);
        self.read_elements(unit, exact, range.clone(), |offset, bytes| {
            let count = bytes.len() / size;
            carry_exact(&tensors, bytes, &mut out[offset..offset + count]);
        })?;
        if live {
            // What the next update would take for the master, whichever format holds it.
            let size = self.compute.size();
            self.read_elements(unit, StateKey::WEIGHT, range, |offset, bytes| {
                let count = bytes.len() / size;
                join_live(&tensors, bytes, &mut out[offset..offset + count]);
            })?;
        }
        Ok(())
    }

    /// Whether the live weights lie in memory that others may write between updates.
    fn may_be_edited(&self, unit: usize) -> bool {
        let weights = &self.units[unit].weights;
        matches!(
            weights,
            Weights::Host { .. } | Weights::Borrowed { lent: Some(_) }
        )
    }

    /// Calls `visit(offset from range.start, bytes)` for the pieces of `range`, wherever the block is.
    pub(crate) fn read_elements(
        &mut self,
        unit: usize,
        key: StateKey,
        range: Range<u64>,
        mut visit: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let this = &self.units[unit];
        let size = this.element_bytes(key);
        let local = range.start - this.base..range.end - this.base;
        if key == StateKey::WEIGHT && this.weights.in_memory() {
            return match &this.weights {
                Weights::Borrowed { lent } => {
                    let lent = lent.as_ref().expect("in memory");
                    visit(0, &lent.weight[byte_range(&range, size)]);
                    Ok(())
                }
                Weights::Moving {
                    home: Some(home), ..
                } => {
                    visit(0, &home[byte_range(&local, size)]);
                    Ok(())
                }
                other => {
                    let window = other.window().expect("not borrowed");
                    visit(0, &window.lease(byte_range(&range, size))?);
                    Ok(())
                }
            };
        }
        if key == StateKey::WEIGHT && matches!(this.weights, Weights::Borrowed { .. }) {
            return misuse(
                "read_param",
                "the weight is the caller's own and was not lent",
            );
        }
        if key != StateKey::WEIGHT
            && let StateBlocks::Host { blocks } = &this.state
        {
            let (_, lease) = blocks
                .iter()
                .find(|(found, _)| *found == key)
                .expect("the unit has this tensor");
            visit(0, &lease[byte_range(&local, size)]);
            return Ok(());
        }
        let tiles = this.tiles_of(key);
        let mut at = local.start;
        while at < local.end {
            let tile = tiles.tile_of(at);
            let whole = tiles.range(tile);
            let end = whole.end.min(local.end);
            let lease =
                self.cached_tile(unit, key, tile, to_usize(whole.end - whole.start) * size)?;
            visit(
                to_usize(at - local.start),
                &lease[byte_range(&(at - whole.start..end - whole.start), size)],
            );
            at = end;
        }
        Ok(())
    }

    fn cached_tile(
        &mut self,
        unit: usize,
        key: StateKey,
        tile: u32,
        bytes: usize,
    ) -> Result<&Lease> {
        let hit = self
            .cache
            .iter()
            .position(|cached| cached.unit == unit && cached.key == key && cached.tile == tile);
        let index = if let Some(index) = hit {
            index
        } else {
            if self.cache.len() == CACHED_TILES {
                self.cache.remove(0);
            }
            let disk = self.disk.as_ref().expect("the block is on disk");
            let buffer = disk.ring.lease(bytes, zeroxide_layout::PAGE)?;
            let (sender, receiver) = channel();
            disk.store
                .start_read(block(unit, key), tile, buffer, u64::from(tile), &sender)
                .map_err(|(error, _)| error)?;
            let completion = receive(&receiver, &mut self.waited)?;
            completion.result?;
            disk.store
                .verify(block(unit, key), tile, &completion.buffer)?;
            self.cache.push(CachedTile {
                unit,
                key,
                tile,
                bytes: completion.buffer,
            });
            self.cache.len() - 1
        };
        Ok(&self.cache[index].bytes)
    }

    /// Updates made so far to one parameter.
    pub(crate) fn updates(&self, unit: usize, param: usize) -> Result<u64> {
        self.check_param("updates", unit, param)?;
        Ok(self.units[unit].params[param].updates)
    }

    /// Sets the number of updates made so far, when a checkpoint is loaded.
    pub(crate) fn set_updates(&mut self, unit: usize, param: usize, updates: u64) -> Result<()> {
        self.check_param("set_updates", unit, param)?;
        self.units[unit].params[param].updates = updates;
        Ok(())
    }
}
