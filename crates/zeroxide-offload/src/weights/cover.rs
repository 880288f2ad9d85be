//! Weights that are not complete, and whether anybody may see them.
//!
//! Whoever uses parameters knows when their unit is gathered. A view that outlived its use does not: its reader must
//! find
//! all of the unit's weights under the window, of one step, or fault. While such readers may be there the unit is
//! *covered*: parts that arrive, and updates, lie beside the window, and come under it together. Everywhere else they
//! go
//! where they belong at once.

use zeroxide_memory::{Anchor, Window, WindowState};

use crate::core::{Core, to_usize};
use crate::error::Result;
use crate::weights::residence::{Residence, UnitWeights};

/// Where frames lie while they are filled.
#[derive(Clone, Copy)]
pub(crate) enum Under {
    /// Where readers find them at once.
    Window,
    /// Beside the window, until they are complete.
    Nothing,
}

impl Core {
    /// The unit's weights are about to change while somebody may read them: from here on such a reader faults, until
    /// all
    /// of the unit is gathered again.
    pub(crate) fn cover(&mut self, unit: usize) -> Result<()> {
        self.check_unit("cover", unit)?;
        if self.units[unit].mesh.has_all() {
            // The only rank has all of it, and waits for the end of a change.
            return Ok(());
        }
        self.set_covered(unit, true);
        self.withdraw(unit)
    }

    /// Where frames of the unit are to lie while they are filled.
    pub(crate) fn under(&self, unit: usize) -> Under {
        match &self.units[unit].weights {
            UnitWeights::Moving { covered: true, .. } => Under::Nothing,
            _ => Under::Window,
        }
    }

    /// The unit is held: where the parts that it lacks are to go.
    pub(crate) fn prepare_for_parts(&mut self, unit: usize, covered: bool) -> Result<()> {
        if self.units[unit].mesh.has_all() {
            return Ok(());
        }
        self.set_covered(unit, covered);
        if !matches!(
            self.residence(unit),
            Some(Residence::Here {
                all_shards_valid: false,
                ..
            })
        ) {
            return Ok(());
        }
        if covered {
            self.withdraw(unit)
        } else {
            self.publish(unit)
        }
    }

    /// Whether the parts that the unit lacks go beside its window.
    pub(crate) fn receives_beside(&self, unit: usize) -> Result<bool> {
        self.check_unit("receives_beside", unit)?;
        Ok(match &self.units[unit].weights {
            UnitWeights::Moving { window, .. } => window.state()? == WindowState::Loading,
            _ => false,
        })
    }

    /// What was filled beside the window is complete: it comes under it.
    pub(crate) fn publish(&mut self, unit: usize) -> Result<()> {
        self.move_pages(unit, WindowState::Loading)
    }

    fn withdraw(&mut self, unit: usize) -> Result<()> {
        if matches!(self.residence(unit), Some(Residence::Here { .. })) {
            self.move_pages(unit, WindowState::Mapped)
        } else {
            Ok(())
        }
    }

    /// Moves the unit's pages to the other side of its window, if they are on that one.
    fn move_pages(&mut self, unit: usize, from: WindowState) -> Result<()> {
        let state = |core: &Self| match &core.units[unit].weights {
            UnitWeights::Moving { window, .. } => window.state().map(Some),
            _ => Ok(None),
        };
        if state(self)? != Some(from) {
            return Ok(());
        }
        if self.units[unit].weights.on_disk() {
            // They read from these pages.
            self.finish_writes(unit)?;
        }
        if let UnitWeights::Moving { window, .. } = &mut self.units[unit].weights {
            match from {
                WindowState::Loading => window.publish()?,
                _ => window.withdraw()?,
            }
        }
        Ok(())
    }

    /// Address, bytes and what keeps the range reserved, on the side of the unit's window that `side` picks.
    pub(crate) fn addresses(
        &self,
        unit: usize,
        side: impl Fn(&Window) -> (*mut u8, Anchor),
    ) -> Option<(usize, usize, Anchor)> {
        let this = &self.units[unit];
        let bytes = to_usize(this.layout.len()) * self.compute.size();
        this.weights.window().map(|window| {
            let (address, anchor) = side(window);
            (address as usize, bytes, anchor)
        })
    }

    fn set_covered(&mut self, unit: usize, value: bool) {
        if let UnitWeights::Moving { covered, .. } = &mut self.units[unit].weights {
            *covered = value;
        }
    }
}
