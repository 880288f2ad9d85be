//! Reads of weights that nobody gathered: a view that outlived its unit's use, on a thread that waits for its bytes.

use std::ops::Range;
use std::sync::{Mutex, Weak};

use zeroxide_memory::FaultNet;

use crate::core::Core;
use crate::error::{OffloadError, Result};
use crate::weights::{Residence, Weights};

impl Core {
    /// Addresses of the weights that come and go, each with its unit.
    pub(crate) fn stray_ranges(&self) -> Vec<(usize, Range<usize>)> {
        let moving = self.units.iter().enumerate();
        moving
            .filter_map(|(index, unit)| match &unit.weights {
                Weights::Moving { window, .. } => {
                    let base = window.base() as usize;
                    Some((index, base..base + window.len()))
                }
                _ => None,
            })
            .collect()
    }

    /// Brings the unit's weights for a reader that nothing announced; they stay as long as no other unit needs the room.
    ///
    /// Only this rank's part can be brought without the other ranks. What cannot be brought reads as zero, and every later
    /// call says so until gradients are cleared.
    fn bring_for_reader(&mut self, unit: usize) {
        let outcome = self.gather_for_reader(unit);
        if let Err(cause) = outcome {
            self.strayed.get_or_insert_with(|| cause.to_string());
            self.show_zeros(unit);
            self.blanked.push(unit);
        }
    }

    fn show_zeros(&self, unit: usize) {
        if let Weights::Moving { window, .. } = &self.units[unit].weights {
            // Refused only where there is memory already.
            let _ = window.blank();
        }
    }

    fn gather_for_reader(&mut self, unit: usize) -> Result<()> {
        if self.place.world > 1 {
            return Err(OffloadError::Stray {
                unit: self.units[unit].name.clone(),
                cause: "its parts are on several ranks".into(),
            });
        }
        let held = matches!(
            self.residence(unit),
            Some(Residence::Here { pinned: true, .. })
        );
        let name = self.units[unit].name.clone();
        self.gather(unit).map_err(|cause| OffloadError::Stray {
            unit: name,
            cause: cause.to_string(),
        })?;
        if let Some(Residence::Here { pinned, .. }) = self.residence_mut(unit) {
            *pinned = held;
        }
        Ok(())
    }

    /// Refuses everything after a read that got zeros.
    pub(crate) fn check_strays(&self) -> Result<()> {
        match &self.strayed {
            Some(line) => Err(OffloadError::Strayed { line: line.clone() }),
            None => Ok(()),
        }
    }

    /// The results of the pass in which it happened are given up.
    pub(crate) fn forget_strays(&mut self) {
        self.strayed = None;
        for unit in std::mem::take(&mut self.blanked) {
            if let Weights::Moving { window, .. } = &self.units[unit].weights {
                // A window that cannot be closed again shows zeros to whoever reads it next, and is filled before use.
                let _ = window.unblank();
            }
        }
    }
}

/// The net under the windows of `core`; `None` where weights stay where they are.
pub(crate) fn spread(core: &Core, shared: Weak<Mutex<Option<Core>>>) -> Result<Option<FaultNet>> {
    let found = core.stray_ranges();
    if found.is_empty() {
        return Ok(None);
    }
    let (units, ranges): (Vec<usize>, Vec<Range<usize>>) = found.into_iter().unzip();
    let net = FaultNet::spread(&ranges, move |index| {
        if let Some(core) = shared.upgrade() {
            serve(&core, units[index]);
        }
    })?;
    Ok(Some(net))
}

fn serve(core: &Mutex<Option<Core>>, unit: usize) {
    match core.lock() {
        Ok(mut guard) => {
            if let Some(core) = guard.as_mut() {
                core.bring_for_reader(unit);
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
