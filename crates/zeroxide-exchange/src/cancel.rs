//! Calling off all waiting of this process, from any thread.

use std::sync::OnceLock;

use crate::error::{ExchangeError, Result};

/// Set once; every wait then ends with the line and the ranks that were given.
#[derive(Debug, Default)]
pub struct CancelToken {
    reason: OnceLock<(String, Vec<u32>)>,
}

impl CancelToken {
    /// Ends every present and later wait with `line`, which blames `ranks`. Only the first call counts.
    pub fn cancel(&self, line: String, ranks: Vec<u32>) {
        let _ = self.reason.set((line, ranks));
    }

    /// # Errors
    /// [`ExchangeError::Stopped`] once waiting was cancelled.
    pub fn check(&self) -> Result<()> {
        match self.reason.get() {
            Some((line, ranks)) => Err(ExchangeError::Stopped {
                line: line.clone(),
                ranks: ranks.clone(),
            }),
            None => Ok(()),
        }
    }
}
