//! What can go wrong between ranks.

use thiserror::Error;
use zeroxide_memory::MemoryError;

/// Failures of the exchange.
#[derive(Debug, Error)]
pub enum ExchangeError {
    /// Shared memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Somebody cancelled all waiting.
    #[error("{line}")]
    Stopped {
        /// Why, in one line.
        line: String,
        /// The ranks that it blames, of all processes of the job.
        ranks: Vec<u32>,
    },
    /// A call that the protocol does not allow: a mistake in the caller's code.
    #[error("{call}: {what}")]
    Misuse {
        /// The call refused.
        call: &'static str,
        /// Why.
        what: String,
    },
}

/// Short form of every result here.
pub type Result<T> = std::result::Result<T, ExchangeError>;
