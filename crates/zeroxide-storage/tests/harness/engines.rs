//! The engines under test.

use std::time::Duration;

use zeroxide_storage::{EngineKind, SimBacking, SimOptions, StorageError, open_queue};

/// The engines under test, each unless the machine refuses it.
pub(crate) fn uring() -> Option<EngineKind> {
    match open_queue(EngineKind::IoUring, 1) {
        Err(StorageError::IoUringRefused { reason }) => {
            eprintln!("skipped: io_uring is refused here ({reason})");
            None
        }
        _ => Some(EngineKind::IoUring),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "as the one that may be refused")]
pub(crate) fn threads() -> Option<EngineKind> {
    Some(EngineKind::Threads)
}

/// Delays, reordering, and short pieces on: what a real disk may do at its worst without failing.
#[expect(clippy::unnecessary_wraps, reason = "as the one that may be refused")]
pub(crate) fn simulated() -> Option<EngineKind> {
    Some(EngineKind::Simulated(SimOptions {
        seed: 11,
        latency: Duration::ZERO..Duration::from_micros(300),
        reorder: true,
        short_share: 0.3,
        ..SimOptions::default()
    }))
}

#[expect(clippy::unnecessary_wraps, reason = "as the one that may be refused")]
pub(crate) fn simulated_in_memory() -> Option<EngineKind> {
    let backing = SimBacking::Memory;
    Some(EngineKind::Simulated(SimOptions {
        backing,
        ..SimOptions::default()
    }))
}
