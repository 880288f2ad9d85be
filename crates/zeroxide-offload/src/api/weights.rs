//! The public face of the crate, where it is about weights that come and go.

use std::sync::Arc;

use zeroxide_memory::{Activity, Anchor};

use crate::api::Offload;
use crate::error::Result;
use crate::weights::bringer::Bringer;

impl Offload {
    /// Begins a pass: readers that come too late must find this object's net, whoever has handled faults meanwhile.
    ///
    /// Raises what went wrong with reads of weights that were not there.
    pub fn watch_readers(&self) -> Result<()> {
        self.guard.check_process()?;
        if let Some(net) = self.net.lock().expect("no call panics under it").as_ref() {
            net.keep()?;
            return self.with("watch_readers", |core| core.weights.check_strays());
        }
        Ok(())
    }

    /// Address range of a unit's flat weights: (address, bytes, what keeps the range reserved).
    /// `None` for units of borrowed weights.
    pub fn window(&self, unit: usize) -> Result<Option<(usize, usize, Anchor)>> {
        self.with("window", |core| {
            core.check_unit("window", unit)?;
            Ok(core.addresses(unit, |window| (window.base(), window.anchor())))
        })
    }

    /// The other ranks' parts of a gathered unit's weights have been put under its window.
    pub fn set_all_shards_valid(&self, unit: usize) -> Result<()> {
        self.with("set_all_shards_valid", |core| {
            core.set_all_shards_valid(unit)
        })
    }

    /// Makes this rank's part of a unit's weights readable and holds it; returns whether the other ranks' parts are
    /// there, too. Idempotent.
    ///
    /// With `covered` nothing of the unit can be read before [`set_all_shards_valid`](Self::set_all_shards_valid), and
    /// missing parts go [beside](Self::beside) its window.
    pub fn gather(&self, unit: usize, covered: bool) -> Result<bool> {
        self.recorded(Activity::Gather, unit, |bytes| {
            self.with_peers(
                "gather",
                |core| core.before_gathering(unit),
                |core| {
                    *bytes = core.weight_bytes(unit);
                    core.gather(unit, covered)
                },
            )
        })
    }

    /// Where the parts that a gathered unit lacks are to be put while nobody may see them, as [`window`](Self::window)
    /// gives the place where everybody does; `None` where they go under the window.
    pub fn beside(&self, unit: usize) -> Result<Option<(usize, usize, Anchor)>> {
        self.with("beside", |core| {
            if !core.receives_beside(unit)? {
                return Ok(None);
            }
            Ok(core.addresses(unit, |window| (window.beside(), window.anchor_beside())))
        })
    }

    /// The unit's weights are about to change while somebody may read them unannounced: such a reader faults from
    /// here on.
    pub fn cover(&self, unit: usize) -> Result<()> {
        self.with("cover", |core| core.cover(unit))
    }

    /// Whoever brings weights from other ranks to readers that nothing announced listens here.
    pub fn bringer(&self) -> Arc<Bringer> {
        Arc::clone(&self.bringer)
    }

    /// As [`gather`](Self::gather), ahead of use; `None` where units that are held leave no room, alike on all ranks.
    pub fn gather_ahead(&self, unit: usize, covered: bool) -> Result<Option<bool>> {
        self.recorded(Activity::Gather, unit, |bytes| {
            self.with_peers(
                "gather_ahead",
                |core| core.before_gathering_ahead(unit),
                |core| {
                    *bytes = core.weight_bytes(unit);
                    core.gather_ahead(unit, covered)
                },
            )
        })
    }

    /// Whether a unit's weights have room beside those of all units that are held.
    pub fn has_room(&self, unit: usize) -> Result<bool> {
        self.with("has_room", |core| core.has_room(unit))
    }

    /// Starts reading a unit if there is room; returns whether it is here or on its way.
    pub fn prefetch(&self, unit: usize) -> Result<bool> {
        self.with("prefetch", |core| core.prefetch(unit))
    }

    /// Makes what was written into a gathered unit's weights, under their window, the live weights. With one rank.
    pub fn rewrite_weights(&self, unit: usize) -> Result<()> {
        self.with("rewrite_weights", |core| core.rewrite_weights(unit))
    }

    /// Lets a unit's memory be taken by another one. Idempotent.
    pub fn release(&self, unit: usize) -> Result<()> {
        self.with("release", |core| core.release(unit))
    }
}
