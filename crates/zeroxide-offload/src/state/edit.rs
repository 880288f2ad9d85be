//! Single parameters changed where they are: what users write into weights, moments and gradients between steps.
//!
//! A fill replaces a unit as a whole; here everything beside the elements written stays as it is.

use std::ops::Range;

use zeroxide_layout::{STATE_BLOCK, StateKey, StateTensor};
use zeroxide_optim::{
    Accumulate, AccumulateStats, Grad, accumulate, bf16_to_f32, encode_live, f16_to_f32,
};

use crate::core::{Core, byte_range, to_usize};
use crate::error::{Result, misuse};
use crate::gradients::accumulate::{as_grad, grad_mut, measure};
use crate::state::fill::{store_state, stored_beside, whole_blocks};
use crate::unit::{Gradient, StateBlocks};
use crate::weights::gather::block;
use crate::weights::residence::{Residence, UnitWeights};

impl Core {
    /// Writes elements `start..` of one parameter, given as fp32, wherever this rank keeps them; elements of other
    /// ranks'
    /// shards are left out.
    ///
    /// Every rank calls it, with the whole parameter or with its own part. With parts, the other ranks' parts of the
    /// live weights count as old afterwards, and the next gather brings them.
    pub(crate) fn write_param(
        &mut self,
        unit: usize,
        param: usize,
        name: &str,
        start: u64,
        values: &[f32],
    ) -> Result<()> {
        self.check_usable()?;
        self.check_between_steps("write_param")?;
        self.check_param("write_param", unit, param)?;
        self.check_here("write_param", unit)?;
        let key = self.units[unit].state_key("write_param", name)?;
        if self.state.fill.is_some() {
            return misuse("write_param", "a unit is being filled");
        }
        self.state.cache.clear();
        self.catch_up(unit)?;
        self.finish_step()?;
        self.wait_reads()?;
        let this = &self.units[unit];
        let numel = this.layout.numel(param);
        let end = start + values.len() as u64;
        if end > numel {
            return misuse(
                "write_param",
                format!("elements {start}..{end} of {numel} in unit {}", this.name),
            );
        }
        if let Some(stored) = stored_beside(&this.tensors, key) {
            whole_blocks("write_param", this.tensor(stored), start..end, numel)?;
        }
        let at = this.layout.offset(param) + start;
        let range = at..at + values.len() as u64;
        let trainable = this.params[param].trainable;
        let tensors = this.tensors.clone();
        if key == StateKey::WEIGHT {
            let element = self.compute.size();
            self.write_live(
                unit,
                &range,
                values.len() as u64 == numel,
                |first, bytes| {
                    let from = to_usize(first - range.start);
                    encode_live(&tensors, &values[from..from + bytes.len() / element], bytes);
                },
            )?;
        } else if this.state.is_pristine() && trainable {
            self.write_initial_moments(unit, None)?;
        }
        let kept = self.units[unit].kept();
        let Some(both) = common(&range, &kept).filter(|_| trainable) else {
            return Ok(());
        };
        let values = &values[to_usize(both.start - range.start)..];
        let local = both.start - kept.start..both.end - kept.start;
        let Some(stored) = stored_beside(&tensors, key) else {
            return Ok(());
        };
        let tensor = *self.units[unit].tensor(stored);
        let count = to_usize(both.end - both.start);
        self.edit_state(unit, &tensor, &local, |first, bytes| {
            // Only the last block may have more room than elements.
            let room =
                first + bytes.len() * STATE_BLOCK / to_usize(tensor.bytes(STATE_BLOCK as u64));
            store_state(&tensors, &tensor, &values[first..room.min(count)], bytes);
        })
    }

    /// The live weights, under the window, at home beside it and on disk. `store(first, bytes)` writes elements of the
    /// unit from `first` on, all of them in `range`; `all` says that `range` is all of a parameter.
    pub(crate) fn write_live(
        &mut self,
        unit: usize,
        range: &Range<u64>,
        all: bool,
        mut store: impl FnMut(u64, &mut [u8]),
    ) -> Result<()> {
        let element = self.compute.size();
        let filled = self.filled_window(unit);
        let alone = self.units[unit].mesh.has_all();
        let shared = self.shares_weights();
        let this = &mut self.units[unit];
        let own = this.own();
        let mut on_disk = false;
        match &mut this.weights {
            UnitWeights::Borrowed { .. } | UnitWeights::Away { .. } => {
                return misuse("write_param", "the weight is the caller's own");
            }
            UnitWeights::Host {
                window,
                all_shards_valid,
            } => {
                if let Some(both) = common(range, &filled) {
                    store(both.start, &mut window.lease(byte_range(&both, element))?);
                }
                *all_shards_valid &= alone || shared || all;
            }
            UnitWeights::Moving {
                window,
                residence,
                home,
                ..
            } => {
                let both = common(range, &own);
                if let (Some(home), Some(both)) = (home.as_mut(), &both) {
                    let local = both.start - own.start..both.end - own.start;
                    store(both.start, &mut home[byte_range(&local, element)]);
                }
                on_disk = home.is_none();
                if let Residence::Here {
                    all_shards_valid, ..
                } = residence
                {
                    if let Some(both) = &both {
                        store(both.start, &mut window.lease(byte_range(both, element))?);
                    }
                    *all_shards_valid &= alone;
                }
            }
        }
        if let (true, Some(both)) = (on_disk, common(range, &own)) {
            let local = both.start - own.start..both.end - own.start;
            let weight = *self.units[unit].tensor(StateKey::WEIGHT);
            self.edit_tiles(unit, &weight, &local, |first, bytes| {
                store(both.start + first as u64, bytes);
            })?;
        }
        Ok(())
    }

    /// Calls `edit(first, bytes)` for the stretches of `local`, elements of this rank's state, wherever the block is.
    fn edit_state(
        &mut self,
        unit: usize,
        tensor: &StateTensor,
        local: &Range<u64>,
        mut edit: impl FnMut(usize, &mut [u8]),
    ) -> Result<()> {
        if let StateBlocks::Host { blocks } = &mut self.units[unit].state {
            let (_, lease) = blocks
                .iter_mut()
                .find(|(found, _)| *found == tensor.key)
                .expect("the unit has this tensor");
            edit(0, &mut lease[tensor.byte_range(local)]);
            return Ok(());
        }
        self.edit_tiles(unit, tensor, local, edit)
    }

    /// Reads, changes and writes back the tiles that hold `local`, one at a time.
    fn edit_tiles(
        &mut self,
        unit: usize,
        tensor: &StateTensor,
        local: &Range<u64>,
        edit: impl FnMut(usize, &mut [u8]),
    ) -> Result<()> {
        let (tiles, id) = (
            self.units[unit].tiles_of(tensor.key),
            block(unit, tensor.key),
        );
        self.disk().edit_block(id, tiles, tensor, local, edit)
    }

    /// Reads elements `start..` of one parameter's gradient as it has been accumulated, as fp32; zero if there is none.
    pub(crate) fn read_grad(
        &mut self,
        unit: usize,
        param: usize,
        start: u64,
        out: &mut [f32],
    ) -> Result<()> {
        self.check_usable()?;
        self.check_between_steps("read_grad")?;
        self.check_param("read_grad", unit, param)?;
        self.check_here("read_grad", unit)?;
        self.finish_unit(unit)?;
        let local = self.kept_range("read_grad", unit, param, start, out.len())?;
        let this = &self.units[unit];
        let arrived = if self.mesh.world() == 1 {
            this.params[param].has_gradient()
        } else {
            !this.fresh
        };
        if arrived && this.grad.is_spilled() {
            self.bring_gradients(unit)?;
        }
        let this = &self.units[unit];
        match this.grad.bytes().filter(|_| arrived) {
            None => out.fill(0.0),
            Some(lease) => match as_grad(
                self.gradients.dtype,
                &lease[byte_range(&local, self.gradients.dtype.size())],
            ) {
                Grad::F32(values) => out.copy_from_slice(values),
                Grad::Bf16(values) => widen(out, values, bf16_to_f32),
                Grad::F16(values) => widen(out, values, f16_to_f32),
            },
        }
        Ok(())
    }

    /// Replaces elements `start..` of one parameter's gradient, rounded to the dtype it is kept in; where there was
    /// none,
    /// the others are zero. The parameter has a gradient afterwards.
    pub(crate) fn write_grad(
        &mut self,
        unit: usize,
        param: usize,
        start: u64,
        values: &[f32],
    ) -> Result<()> {
        self.check_usable()?;
        self.check_between_steps("write_grad")?;
        self.check_param("write_grad", unit, param)?;
        self.check_here("write_grad", unit)?;
        self.catch_up(unit)?;
        self.finish_unit(unit)?;
        let local = self.kept_range("write_grad", unit, param, start, values.len())?;
        let (dtype, element, mesh) = (self.gradients.dtype, self.gradients.dtype.size(), self.mesh);
        self.bring_gradients(unit)?;
        let this = &mut self.units[unit];
        let kept = this.kept();
        let first = this.layout.offset(param);
        let whole = first..first + this.layout.numel(param);
        let present = whole.start.max(kept.start)..whole.end.min(kept.end);
        let slice = this.layout.trainable_shard(this.mesh.slice());
        let counted = present.start.max(slice.start)..present.end.min(slice.end);
        let (Some(grad), true) = (this.grad.bytes_mut(), this.params[param].trainable) else {
            return misuse(
                "write_grad",
                format!("a parameter of {} is frozen", this.name),
            );
        };
        if mesh.world() > 1 && this.fresh {
            grad.fill(0);
            this.fresh = false;
        } else if mesh.world() == 1 && !this.params[param].has_gradient() {
            grad[byte_range(&present, element)].fill(0);
        }
        accumulate(
            grad_mut(dtype, &mut grad[byte_range(&local, element)]),
            Grad::F32(values),
            Accumulate::Store,
            false,
        );
        let state = &mut this.params[param];
        if !state.has_gradient() {
            state.gradient = Gradient::Kept;
        }
        state.norm = AccumulateStats::default();
        if counted.start < counted.end {
            let counted = counted.start - kept.start..counted.end - kept.start;
            state.norm = measure(&self.pool, dtype, &mut grad[byte_range(&counted, element)]);
        }
        Ok(())
    }

    /// Elements of a parameter as elements of the gradients that this rank keeps.
    fn kept_range(
        &self,
        call: &'static str,
        unit: usize,
        param: usize,
        start: u64,
        count: usize,
    ) -> Result<Range<u64>> {
        let this = &self.units[unit];
        let kept = this.kept();
        let at = this.layout.offset(param) + start;
        let range = at..at + count as u64;
        if start + count as u64 > this.layout.numel(param)
            || (count > 0 && (range.start < kept.start || range.end > kept.end))
        {
            return misuse(
                call,
                format!(
                    "elements {start}..{} of a parameter of unit {}; this rank keeps {kept:?} of the unit's",
                    start + count as u64,
                    this.name
                ),
            );
        }
        if count == 0 {
            return Ok(0..0);
        }
        Ok(range.start - kept.start..range.end - kept.start)
    }
}

/// What `range` and `other` have in common.
fn common(range: &Range<u64>, other: &Range<u64>) -> Option<Range<u64>> {
    let both = range.start.max(other.start)..range.end.min(other.end);
    (both.start < both.end).then_some(both)
}

fn widen(out: &mut [f32], values: &[u16], convert: impl Fn(u16) -> f32) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = convert(*value);
    }
}
