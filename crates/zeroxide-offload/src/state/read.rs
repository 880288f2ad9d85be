//! Whole values out: checkpoints and inspection. Always as fp32, whatever the format keeps.

use std::ops::Range;

use zeroxide_layout::{STATE_BLOCK, StateDtype, StateKey, StateTensor};
use zeroxide_memory::Lease;
use zeroxide_optim::{carry_exact, decode_moment, exact_suffices, join_live, widen};

use crate::core::{Core, to_usize};
use crate::error::{Result, misuse};
use crate::tile_io::{tile_bytes, tiles_with};
use crate::unit::StateBlocks;
use crate::weights::gather::block;
use crate::weights::residence::UnitWeights;

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
        self.check_between_steps("read_param")?;
        self.check_param("read_param", unit, param)?;
        self.check_here("read_param", unit)?;
        let key = self.units[unit].state_key("read_param", name)?;
        if out.is_empty() {
            return Ok(());
        }
        self.catch_up(unit)?;
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
            let tensor = *this.tensor(key);
            return read_moment(&tensor, range, out, |range, visit| {
                self.read_elements(unit, key, range, visit)
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
        let size = to_usize(self.units[unit].tensor(exact).bytes(1));
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
            UnitWeights::Host { .. } | UnitWeights::Borrowed { lent: Some(_) }
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
        let tensor = *this.tensor(key);
        let local = range.start - this.base..range.end - this.base;
        if key == StateKey::WEIGHT && this.weights.in_memory() {
            return match &this.weights {
                UnitWeights::Borrowed { lent } => {
                    let lent = lent.as_ref().expect("in memory");
                    visit(0, &lent.weight[tensor.byte_range(&range)]);
                    Ok(())
                }
                UnitWeights::Moving {
                    home: Some(home), ..
                } => {
                    visit(0, &home[tensor.byte_range(&local)]);
                    Ok(())
                }
                other => {
                    let window = other.window().expect("not borrowed");
                    visit(0, &window.lease(tensor.byte_range(&range))?);
                    Ok(())
                }
            };
        }
        if key == StateKey::WEIGHT && matches!(this.weights, UnitWeights::Borrowed { .. }) {
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
            visit(0, &lease[tensor.byte_range(&local)]);
            return Ok(());
        }
        let tiles = this.tiles_of(key);
        for (tile, inside, first) in tiles_with(tiles, local) {
            let bytes = tile_bytes(&tensor, &tiles.range(tile));
            let lease = self.cached_tile(unit, key, tile, bytes)?;
            visit(first, &lease[tensor.byte_range(&inside)]);
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
            .state
            .cache
            .iter()
            .position(|cached| cached.unit == unit && cached.key == key && cached.tile == tile);
        let index = if let Some(index) = hit {
            index
        } else {
            if self.state.cache.len() == CACHED_TILES {
                self.state.cache.remove(0);
            }
            let bytes = self.disk().read_tile(block(unit, key), tile, bytes)?;
            self.state.cache.push(CachedTile {
                unit,
                key,
                tile,
                bytes,
            });
            self.state.cache.len() - 1
        };
        Ok(&self.state.cache[index].bytes)
    }

    /// Updates made so far to one parameter.
    pub(crate) fn updates(&self, unit: usize, param: usize) -> Result<u64> {
        self.check_param("updates", unit, param)?;
        let state = &self.units[unit].params[param];
        Ok(state.updates + state.missed)
    }

    /// Sets the number of updates made so far, when a checkpoint is loaded.
    pub(crate) fn set_updates(&mut self, unit: usize, param: usize, updates: u64) -> Result<()> {
        self.check_param("set_updates", unit, param)?;
        self.catch_up(unit)?;
        self.units[unit].params[param].updates = updates;
        Ok(())
    }
}

/// Reads elements `range` of one of a rule's own tensors, in whose blocks `read` visits (offset from its range's start,
/// bytes).
pub(crate) fn read_moment(
    tensor: &StateTensor,
    range: Range<u64>,
    out: &mut [f32],
    read: impl FnOnce(Range<u64>, &mut dyn FnMut(usize, &[u8])) -> Result<()>,
) -> Result<()> {
    if !matches!(tensor.dtype, StateDtype::Blocks { .. }) {
        let size = to_usize(tensor.bytes(1));
        return read(range, &mut |offset, bytes| {
            let count = bytes.len() / size;
            decode_moment(tensor, bytes, &mut out[offset..offset + count]);
        });
    }
    let block = STATE_BLOCK as u64;
    let blocks = range.start / block * block..range.end.next_multiple_of(block);
    let bytes_of_one = to_usize(tensor.bytes(block));
    let before = to_usize(range.start - blocks.start);
    read(blocks, &mut |offset, bytes| {
        let mut values = [0.0; STATE_BLOCK];
        for (index, bytes) in bytes.chunks_exact(bytes_of_one).enumerate() {
            decode_moment(tensor, bytes, &mut values);
            // Of the first block and the last one only a part may be asked for.
            let first = offset + index * STATE_BLOCK;
            let skip = before.saturating_sub(first);
            let to = first + skip - before;
            let count = (STATE_BLOCK - skip).min(out.len() - to);
            out[to..to + count].copy_from_slice(&values[skip..skip + count]);
        }
    })
}
