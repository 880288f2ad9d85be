//! One optimizer step: its constants, the stream of tiles, and the update of one tile.

mod lent;
pub(crate) mod plan;
pub(crate) mod stream;
mod update;

use crate::error::{OffloadError, Result};
use crate::io_report::{Stopwatch, Tally};
use crate::step::stream::ActiveStep;

/// Optimizer steps: the one under way, and what those before it have left.
#[derive(Default)]
pub(crate) struct Step {
    /// Whether steps go on after they were begun though nothing is at home on disk.
    pub(crate) deferred: bool,
    /// The step under way.
    pub(crate) active: Option<ActiveStep>,
    /// Steps begun.
    pub(crate) count: u64,
    /// The step that failed half way, and its error.
    pub(crate) poisoned: Option<(u64, String)>,
    /// Tiles updated.
    pub(crate) tiles: Tally,
    /// Time that calls spent on steps, waiting included.
    pub(crate) updating: Stopwatch,
}

impl Step {
    /// Refuses everything once a step has failed half way.
    pub(crate) fn check_whole(&self) -> Result<()> {
        match &self.poisoned {
            Some((step, cause)) => Err(OffloadError::Poisoned {
                step: *step,
                cause: cause.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Whether tiles of the unit still wait for their update.
    pub(crate) fn is_updating(&self, unit: usize) -> bool {
        self.active
            .as_ref()
            .is_some_and(|step| step.is_updating(unit))
    }
}
