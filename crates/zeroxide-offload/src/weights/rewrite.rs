//! Weights that somebody has written into, under their window: brought home as they are.

use std::sync::mpsc::channel;

use zeroxide_layout::StateKey;

use crate::core::{Core, byte_range, receive};
use crate::error::{Result, misuse};
use crate::weights::gather::block;
use crate::weights::residence::Residence;

impl Core {
    /// Makes what lies under a gathered unit's window its live weights, on disk too. Exact halves stay as they are: the
    /// next update joins them to what is live.
    pub(crate) fn rewrite_weights(&mut self, unit: usize) -> Result<()> {
        self.check_usable()?;
        self.check_unit("rewrite_weights", unit)?;
        self.finish_unit(unit)?;
        if !self.units[unit].weights.on_disk() {
            return Ok(());
        }
        if !matches!(self.residence(unit), Some(Residence::Here { .. })) || self.mesh.world > 1 {
            return misuse(
                "rewrite_weights",
                "the unit is not gathered by its only rank",
            );
        }
        self.finish_writes(unit)?;
        self.cache.clear();
        let this = &self.units[unit];
        let window = this
            .weights
            .window()
            .expect("weights on disk have a window");
        let disk = self.disk();
        let (sender, receiver) = channel();
        let mut in_flight = 0_u32;
        let mut outcome = Ok(());
        for tile in 0..this.weight_tiles.count() {
            let flat = this.flat(&this.weight_tiles.range(tile));
            let buffer = window.lease(byte_range(&flat, self.compute.size()))?;
            let id = block(unit, StateKey::WEIGHT);
            match disk
                .store
                .start_write(id, tile, buffer, u64::from(tile), &sender)
            {
                Ok(()) => in_flight += 1,
                Err((error, _)) => {
                    outcome = Err(error.into());
                    break;
                }
            }
        }
        for _ in 0..in_flight {
            let written = receive(&receiver, &mut self.waited)?.result;
            if outcome.is_ok() {
                outcome = written.map_err(Into::into);
            }
        }
        outcome
    }
}
