//! Whole values in: initial weights and checkpoints. Always as fp32, whatever the format keeps.

use std::ops::Range;
use std::sync::mpsc::channel;

use zeroxide_layout::{Component, Dtype};
use zeroxide_memory::{Arena, Bucket, Lease};
use zeroxide_optim::{bf16_half_up, f16_nearest_even, split};

use crate::core::{Core, byte_range, receive, to_usize};
use crate::error::{Result, misuse};
use crate::unit::StateBlocks;
use crate::weights::gather::block;
use crate::weights::residence::{Residence, Weights};

/// What a value belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKey {
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
    part: StateKey,
    /// Blocks at home on disk that are collected in memory, with the memory they are in.
    collected: Vec<(Component, Lease)>,
    /// Keeps the memory of `collected` counted in the budget.
    _arena: Option<Arena>,
}

impl Core {
    /// Components other than the live weight that `part` is made of.
    pub(crate) fn side_components(&self, part: StateKey) -> Vec<(Component, usize)> {
        self.state_layout
            .components()
            .iter()
            .copied()
            .filter(|(component, _)| match part {
                StateKey::Weights => matches!(component, Component::Residual | Component::Master),
                StateKey::ExpAvg => *component == Component::ExpAvg,
                StateKey::ExpAvgSq => *component == Component::ExpAvgSq,
            })
            .collect()
    }

    /// The elements under the unit's window that a fill of its weights writes: this rank's, or all where every rank has
    /// its own copy of them.
    pub(crate) fn filled_window(&self, unit: usize) -> Range<u64> {
        let this = &self.units[unit];
        match &this.weights {
            Weights::Borrowed { .. } | Weights::Moving { home: Some(_), .. } => 0..0,
            Weights::Host { .. } if !self.shares_weights() => 0..this.layout.len(),
            _ => this.own(),
        }
    }

    /// Starts to fill `part` of a unit. Everything not filled before the commit is zero.
    pub(crate) fn fill_begin(&mut self, unit: usize, part: StateKey) -> Result<()> {
        self.check_usable()?;
        self.check_unit("fill_begin", unit)?;
        if self.fill.is_some() {
            return misuse("fill_begin", "another fill has not been committed");
        }
        self.cache.clear();
        self.finish_step()?;
        self.wait_reads()?;
        let alone = self.mesh.world == 1;
        if part == StateKey::Weights {
            let own = self.units[unit].own();
            if let Weights::Moving {
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
                && let Weights::Moving { residence, .. } = &mut this.weights
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
        if fill.part == StateKey::Weights {
            if let (Some(window), Some((both, values))) =
                (this.weights.window(), part_of(&window_range))
            {
                let mut lease = window.lease(byte_range(&both, element))?;
                store_weight(self.compute, values, &mut lease);
            }
            if let (
                Weights::Moving {
                    home: Some(home), ..
                },
                Some((both, values)),
            ) = (&mut this.weights, part_of(&own))
            {
                let local = both.start - own.start..both.end - own.start;
                store_weight(self.compute, values, &mut home[byte_range(&local, element)]);
            }
        }
        let Some((both, values)) = part_of(&kept).filter(|_| this.params[param].trainable) else {
            return Ok(());
        };
        let local = to_usize(both.start - kept.start)..to_usize(both.end - kept.start);
        let blocks = match &mut this.state {
            StateBlocks::Host { blocks } => blocks,
            _ => &mut fill.collected,
        };
        for (component, lease) in blocks {
            match (fill.part, component) {
                (StateKey::Weights, Component::Residual) => {
                    let low: &mut [u16] = bytemuck::cast_slice_mut(lease);
                    for (low, value) in low[local.clone()].iter_mut().zip(values) {
                        *low = split(*value).1;
                    }
                }
                (StateKey::Weights, Component::Master) => {
                    store_master(values, &mut bytemuck::cast_slice_mut(lease)[local.clone()]);
                }
                (StateKey::ExpAvg, Component::ExpAvg)
                | (StateKey::ExpAvgSq, Component::ExpAvgSq) => {
                    let target: &mut [f32] = bytemuck::cast_slice_mut(lease);
                    target[local.clone()].copy_from_slice(values);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The unit and the part that are being filled.
    pub(crate) fn filling(&self) -> Option<(usize, StateKey)> {
        self.fill.as_ref().map(|fill| (fill.unit, fill.part))
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
        if fill.part == StateKey::Weights && this.weights.on_disk() {
            let window = this
                .weights
                .window()
                .expect("weights on disk have a window");
            for tile in 0..this.weight_tiles.count() {
                let flat = this.flat(&this.weight_tiles.range(tile));
                let buffer = window.lease(byte_range(&flat, element))?;
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
        if zero_moments && fill.part != StateKey::Weights {
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
        if let (
            StateKey::Weights,
            Weights::Host {
                all_shards_valid, ..
            },
        ) = (fill.part, &mut self.units[unit].weights)
        {
            // Filled by every rank.
            *all_shards_valid = true;
        }
        outcome
    }

    /// The other moment must exist on disk once one of them does.
    pub(crate) fn write_zero_moments(&mut self, unit: usize, filled: StateKey) -> Result<()> {
        if let StateBlocks::Disk { moments_are_zero } = &mut self.units[unit].state {
            *moments_are_zero = false;
        }
        let other = if filled == StateKey::ExpAvg {
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
}

/// Master weights as every format keeps them: all bits, and one NaN for all.
pub(crate) fn store_master(values: &[f32], target: &mut [f32]) {
    for (target, value) in target.iter_mut().zip(values) {
        *target = if value.is_nan() { f32::NAN } else { *value };
    }
}

pub(crate) fn store_weight(dtype: Dtype, values: &[f32], bytes: &mut [u8]) {
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
