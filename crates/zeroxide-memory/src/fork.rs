//! Noticing that the process was forked.

use thiserror::Error;

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
    /// [`Forked`] in any other process.
    pub fn check_process(&self) -> Result<(), Forked> {
        let current = std::process::id();
        if current == self.created {
            Ok(())
        } else {
            Err(Forked {
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

/// An object was used in another process than the one that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("made in process {created} but used in its forked child {current}")]
pub struct Forked {
    /// Process that made the object.
    pub created: u32,
    /// Process that used it.
    pub current: u32,
}

impl Default for ForkGuard {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
#[expect(
    unsafe_code,
    reason = "forks a child to see what is left of an object there"
)]
pub(crate) mod tests {
    /// Runs `child`, which allocates nothing, in a forked process. Whether it came to its end within two
    /// seconds.
    pub(crate) fn ends_in_child(child: impl FnOnce()) -> bool {
        // SAFETY: the child runs `child` only, which keeps to what is allowed after fork in a process
        // with threads, and leaves without running any destructor of the parent's.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: has the child killed if it is still there in two seconds.
            unsafe { libc::alarm(2) };
            child();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
        let mut status = -1;
        // SAFETY: waits for the child made above and writes to a local.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        waited == pid && status == 0
    }
}
