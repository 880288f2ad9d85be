//! Whole values out: checkpoints and inspection. Always as fp32, whatever the format keeps.

use std::ops::Range;
use std::sync::mpsc::channel;

use zeroxide_layout::{Component, Dtype};
use zeroxide_memory::Lease;
use zeroxide_optim::{bf16_to_f32, f16_to_f32, join, with_bf16, with_f16};

use crate::core::{Core, byte_range, receive, to_usize};
use crate::error::{Result, misuse};
use crate::state::fill::StateKey;
use crate::unit::StateBlocks;
use crate::weights::gather::block;
use crate::weights::residence::Weights;

/// A tile read for inspection; small reads beside one another hit it.
pub(crate) struct CachedTile {
    unit: usize,
    component: Component,
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
        part: StateKey,
        start: u64,
        out: &mut [f32],
    ) -> Result<()> {
        self.check_usable()?;
        self.check_param("read_param", unit, param)?;
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
        if part != StateKey::Weights {
            let component = if part == StateKey::ExpAvg {
                Component::ExpAvg
            } else {
                Component::ExpAvgSq
            };
            let zero = matches!(
                this.state,
                StateBlocks::Disk {
                    moments_are_zero: true
                }
            );
            if zero || !trainable {
                out.fill(0.0);
                return Ok(());
            }
            return self.read_elements(unit, component, range, |offset, bytes| {
                let values: &[f32] = bytemuck::cast_slice(bytes);
                out[offset..offset + values.len()].copy_from_slice(values);
            });
        }
        let master = self.element_bytes(Component::Master) > 0 && trainable;
        let compute = self.compute;
        let component = if master {
            Component::Master
        } else {
            Component::Weight
        };
        self.read_elements(unit, component, range.clone(), |offset, bytes| {
            let dtype = if master { Dtype::F32 } else { compute };
            let count = bytes.len() / dtype.size();
            load_weight(dtype, bytes, &mut out[offset..offset + count]);
        })?;
        if trainable && self.element_bytes(Component::Residual) > 0 {
            self.read_elements(unit, Component::Residual, range, |offset, bytes| {
                let low: &[u16] = bytemuck::cast_slice(bytes);
                for (value, low) in out[offset..offset + low.len()].iter_mut().zip(low) {
                    // The high half was widened above: its bits are the upper half of the value's.
                    let high = (value.to_bits() >> 16) as u16;
                    *value = join(high, *low);
                }
            })?;
        } else if master && self.may_be_edited(unit) {
            // What the next update would take for the master, whichever format holds it.
            self.read_elements(unit, Component::Weight, range, |offset, bytes| {
                let live: &[u16] = bytemuck::cast_slice(bytes);
                for (value, live) in out[offset..offset + live.len()].iter_mut().zip(live) {
                    *value = match compute {
                        Dtype::F16 => with_f16(*value, *live),
                        _ => with_bf16(*value, *live),
                    };
                }
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
        component: Component,
        range: Range<u64>,
        mut visit: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let size = self.element_bytes(component);
        let this = &self.units[unit];
        let local = range.start - this.base..range.end - this.base;
        if component == Component::Weight && this.weights.in_memory() {
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
        if component == Component::Weight && matches!(this.weights, Weights::Borrowed { .. }) {
            return misuse(
                "read_param",
                "the weight is the caller's own and was not lent",
            );
        }
        if component != Component::Weight
            && let StateBlocks::Host { blocks } = &this.state
        {
            let (_, lease) = blocks
                .iter()
                .find(|(found, _)| *found == component)
                .expect("the format has this component");
            visit(0, &lease[byte_range(&local, size)]);
            return Ok(());
        }
        let tiles = if component == Component::Weight {
            this.weight_tiles
        } else {
            this.state_tiles
        };
        let mut at = local.start;
        while at < local.end {
            let tile = tiles.tile_of(at);
            let whole = tiles.range(tile);
            let end = whole.end.min(local.end);
            let lease = self.cached_tile(
                unit,
                component,
                tile,
                to_usize(whole.end - whole.start) * size,
            )?;
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
        component: Component,
        tile: u32,
        bytes: usize,
    ) -> Result<&Lease> {
        let hit = self.cache.iter().position(|cached| {
            cached.unit == unit && cached.component == component && cached.tile == tile
        });
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
                .start_read(
                    block(unit, component),
                    tile,
                    buffer,
                    u64::from(tile),
                    &sender,
                )
                .map_err(|(error, _)| error)?;
            let completion = receive(&receiver, &mut self.waited)?;
            completion.result?;
            disk.store
                .verify(block(unit, component), tile, &completion.buffer)?;
            self.cache.push(CachedTile {
                unit,
                component,
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

fn load_weight(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        Dtype::Bf16 => {
            for (value, source) in out.iter_mut().zip(bytemuck::cast_slice::<u8, u16>(bytes)) {
                *value = bf16_to_f32(*source);
            }
        }
        Dtype::F16 => {
            for (value, source) in out.iter_mut().zip(bytemuck::cast_slice::<u8, u16>(bytes)) {
                *value = f16_to_f32(*source);
            }
        }
    }
}
