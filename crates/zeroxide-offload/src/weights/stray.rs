//! Reads of weights that nobody gathered: a view that outlived its unit's use, on a thread that waits for its bytes.

use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use zeroxide_memory::FaultNet;

use crate::core::Core;
use crate::error::{OffloadError, Result};
use crate::weights::bringer::Bringer;
use crate::weights::residence::{Residence, UnitWeights};

impl Core {
    /// Addresses of the weights that come and go, each with its unit.
    pub(crate) fn stray_ranges(&self) -> Vec<(usize, Range<usize>)> {
        let moving = self.units.iter().enumerate();
        moving
            .filter_map(|(index, unit)| match &unit.weights {
                UnitWeights::Moving { window, .. } => {
                    let base = window.base() as usize;
                    Some((index, base..base + window.len()))
                }
                _ => None,
            })
            .collect()
    }

    /// Brings the unit's weights for a reader that nothing announced; they stay as long as no other unit needs the
    /// room.
    ///
    /// What cannot be brought reads as zero, and every later call says so until gradients are cleared.
    fn bring_for_reader(&mut self, unit: usize) {
        let outcome = self.gather_for_reader(unit);
        if let Err(cause) = outcome {
            self.refuse_reader(unit, &cause);
        }
    }

    fn refuse_reader(&mut self, unit: usize, cause: &OffloadError) {
        self.weights
            .strayed
            .get_or_insert_with(|| cause.to_string());
        self.show_zeros(unit);
        self.weights.blanked.push(unit);
    }

    /// The error of a reader that got no weights.
    fn stray(&self, unit: usize, cause: String) -> OffloadError {
        OffloadError::Stray {
            unit: self.units[unit].name.clone(),
            cause,
        }
    }

    fn show_zeros(&self, unit: usize) {
        if let UnitWeights::Moving { window, .. } = &self.units[unit].weights {
            // Refused only where there is memory already.
            let _ = window.blank();
        }
    }

    fn gather_for_reader(&mut self, unit: usize) -> Result<()> {
        let held = matches!(
            self.residence(unit),
            Some(Residence::Here { pinned: true, .. })
        );
        if let Err(cause) = self.gather(unit, false) {
            return Err(self.stray(unit, cause.to_string()));
        }
        if let Some(Residence::Here { pinned, .. }) = self.residence_mut(unit) {
            *pinned = held;
        }
        Ok(())
    }

    /// The last call for the unit: what a reader finds from here on is complete weights, or NaN.
    pub(crate) fn leave_to_readers(&mut self, unit: usize) -> Result<()> {
        self.check_unit("close", unit)?;
        let all_shards_valid = matches!(
            self.residence(unit),
            Some(Residence::Here {
                all_shards_valid: true,
                ..
            })
        );
        if let UnitWeights::Moving { window, .. } = &mut self.units[unit].weights {
            if all_shards_valid && window.is_mapped() {
                return Ok(());
            }
            drop(window.unmap());
            window.ruin()?;
        }
        Ok(())
    }

    /// The results of the pass in which it happened are given up.
    pub(crate) fn forget_strays(&mut self) {
        self.weights.strayed = None;
        for unit in std::mem::take(&mut self.weights.blanked) {
            if let UnitWeights::Moving { window, .. } = &self.units[unit].weights {
                // A window that cannot be closed again shows zeros to whoever reads it next, and is filled before use.
                let _ = window.unblank();
            }
        }
    }
}

/// The net under the windows of `core`; `None` where weights stay where they are.
///
/// Where weights lie in parts on several ranks, `bringer` has them brought.
pub(crate) fn spread(
    core: &Core,
    shared: Weak<Mutex<Option<Core>>>,
    bringer: Arc<Bringer>,
) -> Result<Option<FaultNet>> {
    let found = core.stray_ranges();
    if found.is_empty() {
        return Ok(None);
    }
    let alone = core.mesh.has_all();
    let (units, ranges): (Vec<usize>, Vec<Range<usize>>) = found.into_iter().unzip();
    let net = FaultNet::spread(&ranges, move |index| {
        let unit = units[index];
        let Some(core) = shared.upgrade() else {
            return;
        };
        if alone {
            serve(&core, unit, |core| core.bring_for_reader(unit));
            return;
        }
        let outcome = if has_strayed(&core) {
            Err("another read had got no weights".into())
        } else {
            // Whoever brings it makes calls of its own: nothing is locked meanwhile.
            bringer.ask(unit)
        };
        if let Err(cause) = outcome {
            serve(&core, unit, |core| {
                core.refuse_reader(unit, &core.stray(unit, cause));
            });
        }
    })?;
    Ok(Some(net))
}

/// Whether a reader got no weights, so that the pass is given up and others need not wait for theirs.
fn has_strayed(core: &Mutex<Option<Core>>) -> bool {
    core.lock().is_ok_and(|guard| {
        guard
            .as_ref()
            .is_none_or(|core| core.weights.strayed.is_some())
    })
}

/// Does `work` for a reader of `unit`.
fn serve(core: &Mutex<Option<Core>>, unit: usize, work: impl FnOnce(&mut Core)) {
    match core.lock() {
        Ok(mut guard) => {
            if let Some(core) = guard.as_mut() {
                work(core);
            }
        }
        // A call panicked, which is a bug and ends the run: the reader only has to get that far.
        Err(broken) => {
            if let Some(core) = broken.into_inner().as_ref() {
                core.show_zeros(unit);
            }
        }
    }
}
