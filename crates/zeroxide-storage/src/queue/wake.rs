//! Wakes an engine thread that sleeps in the kernel.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use crate::syscall;

/// An event counter: readable once signalled, until cleared.
#[derive(Debug)]
pub(super) struct Wake {
    event: File,
}

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: syscall::eventfd()?,
        })
    }

    /// Makes the descriptor readable.
    pub(super) fn signal(&self) {
        // Fails only when the counter is full, and then the descriptor is readable already.
        let _ = (&self.event).write(&1_u64.to_ne_bytes());
    }

    /// Makes the descriptor unreadable until the next signal.
    pub(super) fn clear(&self) {
        let mut count = [0_u8; 8];
        // Fails only when there was no signal, and then there is nothing to clear.
        let _ = (&self.event).read(&mut count);
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
