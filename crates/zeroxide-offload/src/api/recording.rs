//! The public face, where it is about what is recorded of a step.

use zeroxide_memory::{Activity, Recording};

use crate::api::Offload;
use crate::error::Result;

impl Offload {
    /// Records from now on what the core does and when, the newest `events` of it: numbers do not change by that. Memory
    /// for them is reserved in `Bucket::Recorder`. Forgets what an earlier call has recorded.
    pub fn start_recording(&self, events: usize) -> Result<()> {
        self.guard.check_process()?;
        self.recorder.start(&self.budget, events)?;
        Ok(())
    }

    /// Ends recording and returns what it has; `None` where it was not begun.
    pub fn stop_recording(&self) -> Result<Option<Recording>> {
        self.guard.check_process()?;
        Ok(self.recorder.stop())
    }

    /// Makes a call that is recorded as `activity` of a unit, with the bytes that it says.
    pub(super) fn recorded<T>(
        &self,
        activity: Activity,
        unit: usize,
        call: impl FnOnce(&mut u64) -> Result<T>,
    ) -> Result<T> {
        let begun = self.recorder.begin();
        let mut bytes = 0;
        let done = call(&mut bytes);
        self.recorder.end(begun, activity, Some(unit), bytes);
        done
    }
}
