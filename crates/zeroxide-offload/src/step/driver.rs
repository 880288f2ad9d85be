//! The step as what a thread goes on with while nobody waits for it: under the next forward, and whatever follows.
//!
//! Whoever needs a unit still drives the step himself, and first: the thread has its turns ([`turns`](super::turns)) only
//! between calls, for one tile at a time, and never waits for the disk in one. What it does and when changes no number.

use crate::core::Core;
use crate::error::{OffloadError, Result};
use crate::step::turns::{Ahead, Turns};
use crate::sync::{Arc, Mutex, Weak};

/// Whose turns `core` has, which is that of `shared`: with a thread where a step outlives its call.
pub(crate) fn start(core: &Core, shared: Weak<Mutex<Option<Core>>>) -> Result<Turns> {
    let notify = Arc::clone(&core.step.notify);
    if core.disk.is_none() && !core.step.deferred {
        return Ok(Turns::alone(notify));
    }
    Turns::start(notify, shared).map_err(|source| OffloadError::Misuse {
        call: "new",
        what: format!("the thread that goes on with steps did not start: {source}"),
    })
}

impl Ahead for Core {
    /// By one tile at most. The next call that needs the state raises what went wrong.
    fn go_ahead(&mut self) -> bool {
        if self.step.poisoned.is_some() || self.step.active.is_none() {
            return false;
        }
        let outcome = self.advance_ahead();
        match self.record_outcome(outcome) {
            Ok(more) => more,
            Err(error) => {
                if let Some(poison) = &self.step.poisoned {
                    poison.unraised.set(Some(error));
                }
                false
            }
        }
    }
}

impl Core {
    fn advance_ahead(&mut self) -> Result<bool> {
        self.note_completions()?;
        if self
            .step
            .active
            .as_ref()
            .is_some_and(super::stream::ActiveStep::is_updated)
        {
            self.retire_step()?;
            return Ok(false);
        }
        self.start_all_reads()?;
        self.update_oldest()
    }
}
