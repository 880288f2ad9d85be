//! Calling off all waiting of this process, from any thread.

use std::sync::OnceLock;

use crate::error::{ExchangeError, Result};

/// Set once; every wait then ends with the line that was given.
#[derive(Debug, Default)]
pub struct CancelToken {
    line: OnceLock<String>,
}

impl CancelToken {
    /// Ends every present and later wait with `line`. Only the first call counts.
    pub fn cancel(&self, line: String) {
        let _ = self.line.set(line);
    }

    /// # Errors
    /// [`ExchangeError::Stopped`] once waiting was cancelled.
    pub fn check(&self) -> Result<()> {
        match self.line.get() {
            Some(line) => Err(ExchangeError::Stopped { line: line.clone() }),
            None => Ok(()),
        }
    }
}
