//! One optimizer step: its constants, the stream of tiles, and the update of one tile.

pub(crate) mod driver;
pub(crate) mod early;
mod lent;
mod missed;
pub(crate) mod plan;
mod speculation;
pub(crate) mod stream;
pub(crate) mod turns;
mod update;

use std::cell::Cell;
use std::sync::Arc;

use zeroxide_storage::Notify;

use crate::error::{OffloadError, Result};
use crate::io_report::{Stopwatch, Tally};
use crate::step::early::EarlyUpdates;
use crate::step::missed::MissedSteps;
use crate::step::stream::ActiveStep;

/// Optimizer steps: the one under way, and what those before it have left.
#[derive(Default)]
pub(crate) struct Step {
    /// Whether steps go on after they were begun though nothing is at home on disk.
    pub(crate) deferred: bool,
    /// Wakes the thread that goes on with steps.
    pub(crate) notify: Arc<Notify>,
    /// The step under way.
    pub(crate) active: Option<ActiveStep>,
    /// The step to come, whose updates may begin before it.
    pub(crate) early: Option<EarlyUpdates>,
    /// Steps begun.
    pub(crate) count: u64,
    /// Those that lazy units have yet to make up for.
    pub(crate) missed: MissedSteps,
    /// The step that failed half way.
    pub(crate) poisoned: Option<Poison>,
    /// Tiles updated.
    pub(crate) tiles: Tally,
    /// Time that calls spent on steps, waiting included.
    pub(crate) updating: Stopwatch,
}

/// Why no call goes on from the state: a step that failed half way.
pub(crate) struct Poison {
    /// Which, from 1.
    pub(crate) step: u64,
    /// The error that it failed with.
    pub(crate) cause: String,
    /// Whether it failed where the caller updates units that are away.
    pub(crate) away: bool,
    /// The error itself, where it has met nobody's call yet.
    pub(crate) unraised: Cell<Option<OffloadError>>,
}

impl Poison {
    pub(crate) fn new(step: u64, cause: &impl ToString, away: bool) -> Self {
        Self {
            step,
            cause: cause.to_string(),
            away,
            unraised: Cell::default(),
        }
    }

    fn error(&self) -> OffloadError {
        if let Some(error) = self.unraised.take() {
            return error;
        }
        let (step, cause) = (self.step, self.cause.clone());
        if self.away {
            OffloadError::PoisonedAway { step, cause }
        } else {
            OffloadError::Poisoned { step, cause }
        }
    }
}

impl Step {
    /// Refuses everything once a step has failed half way.
    pub(crate) fn check_whole(&self) -> Result<()> {
        match &self.poisoned {
            Some(poison) => Err(poison.error()),
            None => Ok(()),
        }
    }

    /// Whether tiles of the unit still wait for their update.
    pub(crate) fn is_updating(&self, unit: usize) -> bool {
        self.active
            .as_ref()
            .is_some_and(|step| step.is_updating(unit))
    }

    /// The unit is used.
    pub(crate) fn note_use(&mut self, unit: usize) {
        if let Some(step) = &mut self.active {
            step.units[unit].ahead = false;
        }
    }

    /// Whether the unit has been updated and not been used since, so that its use is to come.
    pub(crate) fn is_ahead(&self, unit: usize) -> bool {
        self.active
            .as_ref()
            .is_some_and(|step| step.units[unit].ahead)
    }
}
