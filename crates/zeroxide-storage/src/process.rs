//! Which process an object belongs to: threads, rings, and locks do not survive a fork.

use crate::error::StorageError;

/// The process that made an object.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    pid: u32,
}

impl Origin {
    /// Marks the calling process as the maker.
    pub(crate) fn here() -> Self {
        Self {
            pid: std::process::id(),
        }
    }

    /// Whether the caller is still the process that made the object.
    pub(crate) fn is_here(self) -> bool {
        self.pid == std::process::id()
    }

    /// Refuses use in a forked child. Called before any lock is taken: a lock held by another thread
    /// at the moment of the fork stays locked in the child forever.
    pub(crate) fn check(self) -> Result<(), StorageError> {
        let current = std::process::id();
        if self.pid == current {
            Ok(())
        } else {
            Err(StorageError::Forked {
                created: self.pid,
                current,
            })
        }
    }
}
