//! Noticing that the process was forked.

use crate::MemoryError;

/// Remembers the process an object was made in.
///
/// A forked child holds copies of the parent's locks (perhaps taken by threads that do not exist in it)
/// and of its books. Objects that own memory therefore check before they lock anything.
#[derive(Clone, Copy, Debug)]
pub struct ForkGuard {
    created: u32,
}

impl ForkGuard {
    /// A guard for the calling process.
    pub fn new() -> Self {
        Self {
            created: std::process::id(),
        }
    }

    /// Accepts the process that made the guard. Takes no lock and allocates nothing.
    ///
    /// # Errors
    /// [`MemoryError::Forked`] in any other process.
    pub fn check_process(&self) -> Result<(), MemoryError> {
        let current = std::process::id();
        if current == self.created {
            Ok(())
        } else {
            Err(MemoryError::Forked {
                created: self.created,
                current,
            })
        }
    }

    /// Whether the calling process is another one than the guard's.
    pub fn is_forked(&self) -> bool {
        std::process::id() != self.created
    }
}

impl Default for ForkGuard {
    fn default() -> Self {
        Self::new()
    }
}
