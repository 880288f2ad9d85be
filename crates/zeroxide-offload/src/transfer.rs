//! Whole values in and out: initial weights, checkpoints, inspection. Always as fp32, whatever the format keeps.

use std::ops::Range;
use std::sync::mpsc::channel;

use zeroxide_layout::{Component, Dtype};
use zeroxide_memory::{Arena, Bucket, Lease};
use zeroxide_optim::{bf16_half_up, bf16_to_f32, f16_nearest_even, f16_to_f32, join, split};

use crate::core::{Core, byte_range, receive, to_usize};
use crate::error::{Result, misuse};
use crate::gather::block;
use crate::unit::StateBlocks;
use crate::weights::{Residence, Weights};

/// What a value belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The weight with all its bits: the master weight.
    Weights,
    /// First moment.
    ExpAvg,
    /// Second moment.
    ExpAvgSq,
}

/// A unit being filled: nothing of it reaches the disk before the commit.
pub(crate) struct Fill {
    unit: usize,
    part: Part,
    /// Blocks at home on disk that are collected in memory, with the memory they are in.
    collected: Vec<(Component, Lease)>,
    /// Keeps the memory of `collected` counted in the budget.
    _arena: Option<Arena>,
}

/// A tile read for inspection; small reads beside one another hit it.
pub(crate) struct CachedTile {
    unit: usize,
    component: Component,
    tile: u32,
    bytes: Lease,
}

const CACHED_TILES: usize = 2;

impl Core {
    /// Components other than the live weight that `part` is made of.
    fn side_components(&self, part: Part) -> Vec<(Component, usize)> {
        self.state_layout
            .components()
            .iter()
            .copied()
            .filter(|(component, _)| match part {
                Part::Weights => matches!(component, Component::Residual | Component::Master),
                Part::ExpAvg => *component == Component::ExpAvg,
                Part::ExpAvgSq => *component == Component::ExpAvgSq,
            })
            .collect()
    }

    /// Starts to fill `part` of a unit. Everything not filled before the commit is zero.
    pub(crate) fn fill_begin(&mut self, unit: usize, part: Part) -> Result<()> {
        self.check_usable()?;
        self.check_unit("fill_begin", unit)?;
        if self.fill.is_some() {
            return misuse("fill_begin", "another fill has not been committed");
        }
        self.cache.clear();
        self.finish_step()?;
        self.settle_arrivals()?;
        if part == Part::Weights {
            if matches!(self.residence(unit), Some(Residence::Away))
                && !self.map_frames(unit, true)?
            {
                return misuse(
                    "fill_begin",
                    format!("no frames for unit {}", self.units[unit].name),
                );
            }
            if let Some(residence) = self.residence_mut(unit) {
                *residence = Residence::Here {
                    pinned: true,
                    used: 0,
                };
            }
            let this = &self.units[unit];
            if let Some(window) = this.weights.window() {
                let bytes = to_usize(this.layout.len()) * self.compute.size();
                window.lease(0..bytes)?.fill(0);
            }
        }
        let trainable = to_usize(self.units[unit].layout.trainable_len());
        let mut collected = Vec::new();
        let mut arena = None;
        if matches!(self.units[unit].state, StateBlocks::Disk { .. }) {
            let components = self.side_components(part);
            let bytes: usize = components.iter().map(|(_, size)| trainable * size).sum();
            if bytes > 0 {
                let memory = Arena::new(&self.budget, Bucket::Staging, bytes)?;
                for (component, size) in components {
                    let mut lease = memory.lease(trainable * size, zeroxide_layout::PAGE)?;
                    lease.fill(0);
                    collected.push((component, lease));
                }
                arena = Some(memory);
            }
        }
        self.fill = Some(Fill {
            unit,
            part,
            collected,
            _arena: arena,
        });
        Ok(())
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
        let Some(mut fill) = self.fill.take() else {
            return misuse("fill_param", "no fill has begun");
        };
        let outcome = self.fill_into(&mut fill, unit, param, start, values);
        self.fill = Some(fill);
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
        let at = this.layout.offset(param) + start;
        let range = at..at + values.len() as u64;
        if fill.part == Part::Weights
            && let Some(window) = this.weights.window()
        {
            let mut lease = window.lease(byte_range(&range, self.compute.size()))?;
            store_weight(self.compute, values, &mut lease);
        }
        if !this.params[param].trainable {
            return Ok(());
        }
        let blocks = match &mut this.state {
            StateBlocks::Host { blocks } => blocks,
            _ => &mut fill.collected,
        };
        for (component, lease) in blocks {
            let range = to_usize(range.start)..to_usize(range.end);
            match (fill.part, component) {
                (Part::Weights, Component::Residual) => {
                    let low: &mut [u16] = bytemuck::cast_slice_mut(lease);
                    for (low, value) in low[range].iter_mut().zip(values) {
                        *low = split(*value).1;
                    }
                }
                (Part::Weights, Component::Master)
                | (Part::ExpAvg, Component::ExpAvg)
                | (Part::ExpAvgSq, Component::ExpAvgSq) => {
                    let target: &mut [f32] = bytemuck::cast_slice_mut(lease);
                    target[range].copy_from_slice(values);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes what was filled to where it is at home. The unit's weights stay in memory until others need the room.
    pub(crate) fn fill_commit(&mut self, unit: usize) -> Result<()> {
        let Some(fill) = self.fill.take() else {
            return misuse("fill_commit", "no fill has begun");
        };
        if fill.unit != unit {
            return misuse(
                "fill_commit",
                format!("unit {unit}, but unit {} is being filled", fill.unit),
            );
        }
        let (sender, receiver) = channel();
        let mut in_flight = 0_usize;
        let mut outcome: Result<()> = Ok(());
        let this = &self.units[unit];
        let element = self.compute.size();
        if fill.part == Part::Weights && this.weights.on_disk() {
            let window = this
                .weights
                .window()
                .expect("weights on disk have a window");
            for tile in 0..this.weight_tiles.count() {
                let buffer = window.lease(byte_range(&this.weight_tiles.range(tile), element))?;
                self.disk()
                    .store
                    .start_write(
                        block(unit, Component::Weight),
                        tile,
                        buffer,
                        u64::from(tile),
                        &sender,
                    )
                    .map_err(|(error, _)| error)?;
                in_flight += 1;
            }
        }
        let zero_moments = matches!(
            this.state,
            StateBlocks::Disk {
                moments_are_zero: true
            }
        );
        if zero_moments && fill.part != Part::Weights {
            self.write_zero_moments(unit, fill.part)?;
        }
        for (component, mut rest) in fill.collected {
            let size = self.element_bytes(component);
            let tiles = self.units[unit].state_tiles;
            for tile in 0..tiles.count() {
                let range = tiles.range(tile);
                let tail = rest.split_off(to_usize(range.end - range.start) * size);
                let buffer = std::mem::replace(&mut rest, tail);
                self.disk()
                    .store
                    .start_write(
                        block(unit, component),
                        tile,
                        buffer,
                        u64::from(tile),
                        &sender,
                    )
                    .map_err(|(error, _)| error)?;
                in_flight += 1;
            }
        }
        while in_flight > 0 {
            let completion = receive(&receiver, &mut self.waited)?;
            in_flight -= 1;
            if let Err(error) = completion.result {
                outcome = outcome.and(Err(error.into()));
            }
        }
        self.release(unit)?;
        outcome
    }

    /// The other moment must exist on disk once one of them does.
    fn write_zero_moments(&mut self, unit: usize, filled: Part) -> Result<()> {
        if let StateBlocks::Disk { moments_are_zero } = &mut self.units[unit].state {
            *moments_are_zero = false;
        }
        let other = if filled == Part::ExpAvg {
            Component::ExpAvgSq
        } else {
            Component::ExpAvg
        };
        let size = self.element_bytes(other);
        let tiles = self.units[unit].state_tiles;
        for tile in 0..tiles.count() {
            let range = tiles.range(tile);
            let bytes = to_usize(range.end - range.start) * size;
            let disk = self.disk();
            let mut buffer = disk.ring.lease(bytes, zeroxide_layout::PAGE)?;
            buffer.fill(0);
            let (sender, receiver) = channel();
            disk.store
                .start_write(block(unit, other), tile, buffer, u64::from(tile), &sender)
                .map_err(|(error, _)| error)?;
            let completion = receive(&receiver, &mut self.waited)?;
            completion.result?;
        }
        Ok(())
    }

    /// Reads elements `start..` of one parameter as fp32.
    pub(crate) fn read_param(
        &mut self,
        unit: usize,
        param: usize,
        part: Part,
        start: u64,
        out: &mut [f32],
    ) -> Result<()> {
        self.check_usable()?;
        self.check_param("read_param", unit, param)?;
        self.finish_step()?;
        self.settle_arrivals()?;
        let this = &self.units[unit];
        let numel = this.layout.numel(param);
        let end = start + out.len() as u64;
        if end > numel {
            return misuse(
                "read_param",
                format!("elements {start}..{end} of {numel} in unit {}", this.name),
            );
        }
        let trainable = this.params[param].trainable;
        let at = this.layout.offset(param) + start;
        let range = at..at + out.len() as u64;
        if part != Part::Weights {
            let component = if part == Part::ExpAvg {
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
        }
        Ok(())
    }

    /// Calls `visit(offset from range.start, bytes)` for the pieces of `range`, wherever the block is.
    fn read_elements(
        &mut self,
        unit: usize,
        component: Component,
        range: Range<u64>,
        mut visit: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let size = self.element_bytes(component);
        let this = &self.units[unit];
        if component == Component::Weight && this.weights.in_memory() {
            return match &this.weights {
                Weights::Borrowed { lent } => {
                    let lent = lent.as_ref().expect("in memory");
                    visit(0, &lent.weight[byte_range(&range, size)]);
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
            visit(0, &lease[byte_range(&range, size)]);
            return Ok(());
        }
        let tiles = if component == Component::Weight {
            this.weight_tiles
        } else {
            this.state_tiles
        };
        let mut at = range.start;
        while at < range.end {
            let tile = tiles.tile_of(at);
            let whole = tiles.range(tile);
            let end = whole.end.min(range.end);
            let lease = self.cached_tile(
                unit,
                component,
                tile,
                to_usize(whole.end - whole.start) * size,
            )?;
            visit(
                to_usize(at - range.start),
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

fn store_weight(dtype: Dtype, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        Dtype::F32 => bytemuck::cast_slice_mut(bytes).copy_from_slice(values),
        Dtype::Bf16 => {
            for (target, value) in bytemuck::cast_slice_mut::<u8, u16>(bytes)
                .iter_mut()
                .zip(values)
            {
                *target = bf16_half_up(*value);
            }
        }
        Dtype::F16 => {
            for (target, value) in bytemuck::cast_slice_mut::<u8, u16>(bytes)
                .iter_mut()
                .zip(values)
            {
                *target = f16_nearest_even(*value);
            }
        }
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
