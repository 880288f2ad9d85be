//! Weights that somebody has written into, under their window: brought home as they are.

use crate::core::Core;
use crate::error::{Result, misuse};
use crate::tile_io::weight_buffers;
use crate::weights::gather::weight_block;
use crate::weights::residence::Residence;

impl Core {
    /// Makes what lies under a gathered unit's window its live weights, on disk too. Exact halves stay as they are: the
    /// next update joins them to what is live.
    pub(crate) fn rewrite_weights(&mut self, unit: usize) -> Result<()> {
        self.check_usable()?;
        self.check_here("rewrite_weights", unit)?;
        self.check_not_begun("rewrite_weights", unit)?;
        self.finish_unit(unit)?;
        if !self.units[unit].weights.on_disk() {
            return Ok(());
        }
        if !matches!(self.residence(unit), Some(Residence::Here { .. })) || self.mesh.world() > 1 {
            return misuse(
                "rewrite_weights",
                "the unit is not gathered by its only rank",
            );
        }
        self.finish_writes(unit)?;
        self.state.cache.clear();
        let id = weight_block(unit);
        self.disk()
            .write_tiles(weight_buffers(&self.units[unit], id))
    }
}
